"""Every routing policy on one workload: a table, best first.

python examples/leaderboard.py [--requests 1000] [--seeds 2] [--jobs 2] [--trace PATH]

Without `--trace`, questions behind shared system prompts; with it, a trace in
Mooncake's format.  The rate is chosen so that round robin is a little too slow.
"""

import argparse

import llmd
from llmd.router import rivals
from llmd.sim import Slo, compare, traces, workloads

SLO = Slo(ttft_s=2.0, tpot_s=0.05)
POLICIES = {
    "round robin": llmd.RoundRobin(),
    "random": llmd.Random(),
    "power of two": llmd.PowerOfTwo(),
    "least requests": llmd.LeastLoaded(),
    "least work": llmd.LeastWork(),
    "session affinity": llmd.SessionAffinity(),
    "llm-d's default": rivals.llm_d(),
    "llm-d's affinity": rivals.LlmdAffinity(),
    "Dynamo's": rivals.DynamoBlocks(),
    "SGLang's": rivals.SglangCacheAware(),
    "vLLM Router's": rivals.VllmKVAware(),
    "AIBrix's": rivals.AibrixPrefix(),
    "EarliestFirstToken": llmd.EarliestFirstToken(),
    "LeastDelay": llmd.LeastDelay(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--trace")
    options = parser.parse_args()
    if options.trace:
        load = traces.mooncake(options.trace).jittered(3.0).first(options.requests)
        load = load.at_rate(12.0)
    else:
        load = workloads.shared_prefix(
            rate=45.0, requests=options.requests, groups=150, answer_tokens=200
        )
    study = compare(
        POLICIES, load, seeds=options.seeds, slo=SLO, workers=8, jobs=options.jobs
    )
    print(f"{load.name}: {len(load)} requests at {load.rate:.3g}/s on 8 workers\n")
    head = f"{'policy':20} {'good/s':>7} {'TTFT p90, s':>24} {'TPOT p90, s':>12}"
    print(f"{head} {'hits':>6} {'imbalance':>10}")
    for policy in sorted(study.policies, key=study.goodput, reverse=True):
        print(
            f"{policy:20} {study.goodput(policy):7.2f}"
            f" {study.figure(policy, 'ttft')!s:>24}"
            f" {study.figure(policy, 'tpot').value:12.4f}"
            f" {study.mean(policy, 'hit_rate'):6.3f}"
            f" {study.mean(policy, 'imbalance'):10.2f}"
            f" {'overload' if study.overloaded(policy) else ''}"
        )


if __name__ == "__main__":
    main()
