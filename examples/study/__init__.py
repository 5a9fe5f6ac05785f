"""The rows of the GH200 study."""

from .disaggregated import (
    kv_transfer,
    mig_instances,
    precise_and_pd,
    selective_pd,
    two_and_two,
)
from .routing import (
    approximate_routing,
    kv_scoring,
    new_prefix,
    precise_routing,
    queue_balancing,
    several_models,
)
from .row import Row
from .scaling import autoscaling

ROWS = [
    Row(
        1,
        "approximate prefix-cache routing",
        "5 requests behind one 220-token prompt, block 128: all on one replica, and"
        " the hits its own counters can show at most",
        approximate_routing,
    ),
    Row(
        2,
        "precise prefix-cache routing",
        "the same from KV events, block 32 on one engine and 64 on the other, read"
        " from the events",
        precise_routing,
    ),
    Row(
        3,
        "new prefix goes to the less loaded replica",
        "4 requests of an unseen prefix while one replica is busy",
        new_prefix,
    ),
    Row(
        4,
        "queue-depth balancing",
        "30 concurrent, 512 new tokens each, affinity left on one replica: nobody"
        " gets fewer than 10",
        queue_balancing,
    ),
    Row(
        5,
        "KV-utilisation scoring",
        "each score, weight and total of a decision, prefix x3 + kv x2 + queue x2",
        kv_scoring,
    ),
    Row(
        6,
        "multi-model routing",
        "a second model added and removed under load; an unknown one refused",
        several_models,
    ),
    Row(
        7,
        "autoscaling",
        "20 concurrent requests, 5 a replica: 1 -> 4 -> 1, none lost, none early",
        autoscaling,
    ),
    Row(
        8,
        "selective P/D",
        "under 16 uncached tokens no hand-off: both branches, and a cached prefix",
        selective_pd,
    ),
    Row(
        9,
        "KV transfer",
        "50 prompts of 20-1500 tokens: answers as one engine gives them",
        kv_transfer,
    ),
    Row(
        10,
        "KV transfer between MIG instances",
        "detected before it starts, from recorded answers of the driver",
        mig_instances,
    ),
    Row(
        11,
        "precise prefix routing + P/D",
        "one index serves the scores of both engines and the decider",
        precise_and_pd,
    ),
    Row(
        12,
        "2 prefill + 2 decode",
        "16 at once: all four carry traffic, answers as one engine gives them",
        two_and_two,
    ),
]

__all__ = ["ROWS", "Row"]
