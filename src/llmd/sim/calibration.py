"""What was timed of engines, and the machines and settings that are made of it.

`llmd.adapters.vllm.probe.calibrate` times; the rest needs no engine, so a
calibration that was saved is good on any machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np

from ..amounts import as_real
from ..errors import InvalidHardware, LlmdError
from ..machines import Machine
from ..machines.fit import Step, errors, fit_from_probe
from ..types import Worker
from .sequence import EngineSettings

Pairs: TypeAlias = tuple[tuple[float, float], ...]
"""An amount, of tokens or requests, and seconds."""

_FACTS = (
    "id",
    "machine",
    "kv_blocks",
    "block_tokens",
    "max_model_tokens",
    "max_running",
)
_TIMED = "rests", "launches", "late"
_NEEDED = "step_tokens", "steps_ahead", "graph_tokens"
_MORE = "by_priority", "kv_bytes_per_token", "weights_bytes"


def _pairs(given: Iterable[Iterable[Any]]) -> Pairs:
    """Return *given* as pairs of amounts that can be."""
    pairs = tuple([(as_real(x), as_real(y)) for x, y in given])
    for pair in pairs:
        if not all(0.0 <= amount < math.inf for amount in pair):
            raise InvalidHardware(f"{pair} is no amount and its seconds")
    return pairs


def _plain(worker: Worker) -> Worker:
    """Return what a simulation has to know of *worker*: models and roles are not."""
    facts = {name: getattr(worker, name) for name in _FACTS}
    return Worker(**{**facts, "machine": worker.machine or worker.id})


@attrs.frozen(kw_only=True)
class Probed:
    """What was timed of one engine.

    Attributes:
        worker: What it told, but for models and role; `machine` names its step
            times, or is its id.
        steps: What its steps took.
        rests: Of prompts: tokens, and the seconds of its time to first token in
            which the engine did not compute it.
        launches: Of steps without a prompt: requests, and for how many seconds
            such a step keeps the host busy.
        late: Of prompts: requests that generate meanwhile, and seconds between the
            engine's stamp of the first token and that token.
    """

    worker: Worker = attrs.field(converter=_plain)
    steps: tuple[Step, ...]
    rests: Pairs = attrs.field(converter=_pairs)
    launches: Pairs = attrs.field(default=(), converter=_pairs)
    late: Pairs = attrs.field(default=(), converter=_pairs)


@attrs.frozen(kw_only=True)
class Calibration:
    """A fleet, to be simulated as it was measured.

    Engines that are alike need not be as fast: one may share its core.

    Attributes:
        engines: Each with what was timed of it.
        step_tokens: As of `EngineSettings`.
        steps_ahead: Likewise.
        graph_tokens: As of `Machine`.
        by_priority: As of `EngineSettings`.
        kv_bytes_per_token: As of `Machine`; its default's if 0.
        weights_bytes: Likewise.
        workers: What `simulate` asks for, as the next two.
        machines: Fitted to the steps, by `Worker.machine`.  Their links and memory
            are still those of the default: no step tells of them.
        settings: The intake is fitted to the rest of the times to first token.

    Raises:
        InvalidHardware: There is no engine, too little was timed, or two engines have
            one id or name one machine.

    >>> steps = [Step(n, 0, 0, 0, 0.01 + 1e-5 * n) for n in (64, 512, 1024, 2048)]
    >>> rests = ((64, 2e-3), (2048, 4e-3))
    >>> probed = Probed(worker=Worker(id="a", machine="h"), steps=steps, rests=rests)
    >>> found = Calibration(engines=(probed,), step_tokens=2048, steps_ahead=1)
    >>> round(found.machines["h"].prefill_s(1500.0), 3)
    0.025
    >>> round(1e6 * found.settings.intake_s_per_token, 2)
    1.01
    """

    engines: tuple[Probed, ...]
    step_tokens: int
    steps_ahead: int
    graph_tokens: float = 0.0
    by_priority: bool = False
    kv_bytes_per_token: float = 0.0
    weights_bytes: float = 0.0
    machines: Mapping[str, Machine] = attrs.field(init=False, repr=False)
    settings: EngineSettings = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.engines:
            raise InvalidHardware("no engine was probed")
        for name in ("id", "machine"):
            named = [getattr(probed.worker, name) for probed in self.engines]
            if len(set(named)) < len(named):
                raise InvalidHardware(f"two engines have one {name}: {named}")
        machines = {p.worker.machine: self._machine(p) for p in self.engines}
        object.__setattr__(self, "machines", machines)
        rests = [pair for probed in self.engines for pair in probed.rests]
        late = [pair for probed in self.engines for pair in probed.late]
        base_s, token_s = line(rests)
        settings = EngineSettings(
            step_tokens=self.step_tokens,
            steps_ahead=self.steps_ahead,
            by_priority=self.by_priority,
            intake_s=base_s,
            intake_s_per_token=token_s,
            intake_s_per_request=line(late)[1] if late else 0.0,
        )
        object.__setattr__(self, "settings", settings)

    @property
    def workers(self) -> list[Worker]:
        """What the engines told."""
        return [probed.worker for probed in self.engines]

    def __str__(self) -> str:
        fits = [
            str(errors(self.machines[probed.worker.machine], probed.steps))
            for probed in self.engines
        ]
        settings = self.settings
        intake = (
            f"intake: {settings.intake_s * 1e3:.1f} ms,"
            f" {settings.intake_s_per_token * 1e6:.2f} us a token and"
            f" {settings.intake_s_per_request * 1e6:.0f} us for each other request"
        )
        return "; ".join([*fits, intake])

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            InvalidHardware: It is something else.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise InvalidHardware(f"{path} is no JSON: {error}") from error
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise InvalidHardware(f"{path} is no calibration but a JSON {kind}")
        return cls.of(found)

    def as_dict(self) -> dict[str, Any]:
        """Return what `of` takes, for JSON."""
        engines = [
            {
                **{name: getattr(probed.worker, name) for name in _FACTS},
                "steps": [attrs.astuple(step) for step in probed.steps],
                **{name: getattr(probed, name) for name in _TIMED},
            }
            for probed in self.engines
        ]
        told = {name: getattr(self, name) for name in (*_NEEDED, *_MORE)}
        return {"engines": engines, **told}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Calibration:
        """Return what `as_dict` was made of; more in *found* is let be.

        Raises:
            InvalidHardware: Something is missing, or is no amount.
        """
        try:
            engines = [
                Probed(
                    worker=Worker(**{name: engine[name] for name in _FACTS}),
                    steps=tuple([Step(*step) for step in engine["steps"]]),
                    **{name: engine[name] for name in _TIMED},
                )
                for engine in found["engines"]
            ]
            told = {name: found[name] for name in _NEEDED}
            told |= {name: found[name] for name in _MORE if name in found}
            return cls(engines=tuple(engines), **told)
        except KeyError as error:
            raise InvalidHardware(f"a calibration without {error}") from error
        except InvalidHardware:
            raise
        except (TypeError, ValueError, LlmdError) as error:
            raise InvalidHardware(f"this is no calibration: {error}") from error

    def _machine(self, probed: Probed) -> Machine:
        host = line(probed.launches) if probed.launches else (0.0, 0.0)
        known = {
            name: value
            for name in ("kv_bytes_per_token", "weights_bytes")
            if (value := getattr(self, name))
        }
        start = Machine(
            name=probed.worker.machine,
            **known,
            graph_tokens=self.graph_tokens,
            host_s=host[0],
            host_s_per_request=host[1],
        )
        return fit_from_probe(probed.steps, start)


def line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return a line's value at 0 and its slope, neither below 0 (Theil and Sen).

    A few that are late do not bend it.  Seconds of one amount alone have no slope.

    Raises:
        InvalidHardware: There are none.

    >>> line([(1, 3.0), (2, 5.0), (3, 99.0), (4, 9.0)])
    (1.0, 2.0)
    """
    x, y = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    apart = np.subtract.outer(x, x)
    slopes = np.subtract.outer(y, y)[apart > 0] / apart[apart > 0]
    if not len(y):
        raise InvalidHardware("too little was timed: there is nothing to fit a line to")
    slope = max(float(np.median(slopes)), 0.0) if len(slopes) else 0.0
    return max(float(np.median(y - slope * x)), 0.0), slope
