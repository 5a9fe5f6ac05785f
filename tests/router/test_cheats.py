"""Routers that ask a clock, or draw from what they were not given, are caught."""

import copy
import datetime as dt
import logging
import os
import pickle
import random
import secrets
import threading
import time
import uuid
from datetime import date, datetime
from time import localtime as local
from time import time as what_time

import numpy as np
import pytest

import llmd
from llmd.testing import Cheated, RouterContract, sealed

SEALED = "test_uses_no_clock_and_no_global_randomness"
UNSEEDED = np.random.default_rng()


class Sooner(datetime):
    """A name of one's own for the time of day."""


CLOCKS = {
    "time.time": lambda: time.time(),
    "from time import time": lambda: what_time(),
    "time.time_ns": lambda: time.time_ns(),
    "time.monotonic": lambda: time.monotonic(),
    "time.monotonic_ns": lambda: time.monotonic_ns(),
    "time.perf_counter": lambda: time.perf_counter(),
    "time.perf_counter_ns": lambda: time.perf_counter_ns(),
    "time.process_time": lambda: time.process_time(),
    "time.localtime": lambda: time.localtime().tm_sec,
    "from time import localtime": lambda: local().tm_sec,
    "time.gmtime": lambda: time.gmtime().tm_sec,
    "time.ctime": lambda: float(time.ctime()[17:19]),
    "time.strftime": lambda: float(time.strftime("%S")),
    "datetime.now": lambda: datetime.now().timestamp(),
    "datetime.now of a zone": lambda: datetime.now(dt.UTC).timestamp(),
    "datetime.datetime.now": lambda: dt.datetime.now().timestamp(),
    "datetime.utcnow": lambda: datetime.utcnow().timestamp(),
    "datetime.today": lambda: datetime.today().timestamp(),
    "date.today": lambda: date.today().day,
    "of a subclass": lambda: Sooner.now().timestamp(),
    "uuid.uuid1": lambda: uuid.uuid1().time,
}
CHANCES = {
    "random.random": lambda: random.random(),
    "random.choice": lambda: random.choice((1.0, 2.0)),
    "random.gauss": lambda: random.gauss(0.0, 1.0),
    "random.seed": lambda: random.seed(3) or 0.0,
    "through map": lambda: next(map(random.expovariate, (1.0,))),
    "random.Random()": lambda: random.Random().random(),
    "random.SystemRandom": lambda: random.SystemRandom().random(),
    "np.random.rand": lambda: np.random.rand(),
    "np.random.choice": lambda: np.random.choice(3),
    "np.random.seed": lambda: np.random.seed(3) or 0.0,
    "np.random.default_rng()": lambda: np.random.default_rng().random(),
    "np.random.SeedSequence()": lambda: np.random.SeedSequence().entropy % 7,
    "secrets.randbelow": lambda: secrets.randbelow(7),
    "secrets.token_bytes": lambda: secrets.token_bytes(1)[0],
    "uuid.uuid4": lambda: uuid.uuid4().int % 7,
    "os.urandom": lambda: os.urandom(1)[0],
}
# Those that are handed the time, or a seed, or tell nobody.
HONEST = {
    "the time given": lambda: time.gmtime(3.0).tm_sec + local(3.0).tm_sec,
    "a date given": lambda: datetime.fromtimestamp(3.0, dt.UTC).second,
    "a name": lambda: uuid.uuid5(uuid.NAMESPACE_DNS, "x").int % 7,
    "a log line": lambda: logging.getLogger("test").error("told") or 0.0,
    "a seed": lambda: np.random.default_rng(7).random() + random.Random(7).random(),
    "a copy": lambda: copy.deepcopy(random.Random(7)).random(),
    "a pickle": lambda: pickle.loads(pickle.dumps(np.random.default_rng(7))).random(),
}


class Asks(llmd.Router):
    """Adds what it asks for to the price of worker 0."""

    def __init__(self, asked):
        self.asked = asked

    def cost(self, request, view):
        costs = view.workers.running_requests.astype(float)
        costs[:1] += self.asked()
        return costs


def contract(make):
    class Contract(RouterContract):
        def make(self):
            return make()

    return Contract()


def hold_to(contract):
    """Run all of *contract*."""
    for name in dir(contract):
        if name.startswith("test_"):
            getattr(contract, name)()


@pytest.mark.filterwarnings("ignore:.*utcnow:DeprecationWarning")
@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_is_caught(name):
    with pytest.raises(Cheated, match=r"is not view\.now"):
        getattr(contract(lambda: Asks(CLOCKS[name])), SEALED)()


@pytest.mark.parametrize("name", CHANCES)
def test_chance_of_its_own_is_caught(name):
    with pytest.raises(Cheated, match=r"is not view\.rng"):
        getattr(contract(lambda: Asks(CHANCES[name])), SEALED)()


@pytest.mark.parametrize("name", HONEST)
def test_what_is_given_may_be_used(name):
    hold_to(contract(lambda: Asks(HONEST[name])))


@pytest.mark.parametrize("name", ["datetime.now", "random.choice", "uuid.uuid4"])
def test_it_raises_where_it_is_asked(name):
    went_on = []

    def ask():
        went_on.append((CLOCKS | CHANCES)[name]())

    with pytest.raises(Cheated), sealed():
        ask()
    assert not went_on


def test_a_generator_kept_without_a_seed_is_caught_when_it_is_made():
    def make():
        return Asks(np.random.default_rng().random)

    with pytest.raises(Cheated):
        getattr(contract(make), SEALED)()


@pytest.mark.parametrize("kind", [random.Random, np.random.default_rng])
def test_a_generator_kept_with_a_seed_may_be_used(kind):
    hold_to(contract(lambda: Asks(kind(7).random)))


def test_a_generator_of_the_module_gives_itself_away_by_its_decisions():
    draw = contract(lambda: Asks(lambda: UNSEEDED.normal(scale=9.0)))
    getattr(draw, SEALED)()
    with pytest.raises(AssertionError):
        draw.test_is_deterministic()


class Learns(llmd.LeastLoaded):
    """Looks at the clock when a request ends."""

    def ended(self, request, worker, error, view):
        time.monotonic()


def hides():
    """Look at the clock and say nothing of being caught."""
    try:
        return time.monotonic()
    except AssertionError:
        return 0.0


@pytest.mark.parametrize("make", [Learns, lambda: Asks(hides)], ids=["later", "hides"])
def test_who_looks_later_or_hides_it_is_caught(make):
    with pytest.raises(Cheated, match="monotonic"):
        getattr(contract(make), SEALED)()


def test_other_threads_keep_their_clocks():
    told = []
    with sealed():
        other = threading.Thread(target=lambda: told.append(what_time()))
        other.start()
        other.join()
    assert told[0] > 0


def test_a_seal_that_was_broken_leaves_nothing_behind():
    with pytest.raises(Cheated), sealed():
        datetime.now()
    assert datetime.now() < datetime.now() + dt.timedelta(seconds=1)
    assert np.random.rand() < 1
    with sealed():
        pass
