"""What was timed of engines, and the machines and settings that are made of it.

`llmd.adapters.vllm.probe.calibrate` times; the rest needs no engine, so a
calibration that was saved is good on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np

from ..errors import InvalidHardware
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
    rests: Pairs
    launches: Pairs = ()
    late: Pairs = ()


@attrs.frozen(kw_only=True)
class Calibration:
    """A fleet, to be simulated as it was measured.

    Engines that are alike need not be as fast: one may share its core.

    Attributes:
        engines: Each with what was timed of it.
        step_tokens: As of `EngineSettings`.
        steps_ahead: Likewise.
        graph_tokens: As of `Machine`.
        workers: What `simulate` asks for, as the next two.
        machines: Fitted to the steps, by `Worker.machine`.
        settings: The intake is fitted to the rest of the times to first token.

    Raises:
        InvalidHardware: There is no engine, or too little was timed.

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
    machines: Mapping[str, Machine] = attrs.field(init=False, repr=False)
    settings: EngineSettings = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.engines:
            raise InvalidHardware("no engine was probed")
        machines = {p.worker.machine: self._machine(p) for p in self.engines}
        object.__setattr__(self, "machines", machines)
        rests = [pair for probed in self.engines for pair in probed.rests]
        late = [pair for probed in self.engines for pair in probed.late]
        base_s, token_s = line(rests)
        settings = EngineSettings(
            step_tokens=self.step_tokens,
            steps_ahead=self.steps_ahead,
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
        except ValueError as error:
            raise InvalidHardware(f"{path} is no JSON: {error}") from error
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
        return {
            "engines": engines,
            "step_tokens": self.step_tokens,
            "steps_ahead": self.steps_ahead,
            "graph_tokens": self.graph_tokens,
        }

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
                    **{name: tuple(map(tuple, engine[name])) for name in _TIMED},
                )
                for engine in found["engines"]
            ]
            return cls(
                engines=tuple(engines),
                step_tokens=found["step_tokens"],
                steps_ahead=found["steps_ahead"],
                graph_tokens=found["graph_tokens"],
            )
        except KeyError as error:
            raise InvalidHardware(f"a calibration without {error}") from error
        except (TypeError, ValueError) as error:
            raise InvalidHardware(f"this is no calibration: {error}") from error

    def _machine(self, probed: Probed) -> Machine:
        host = line(probed.launches) if probed.launches else (0.0, 0.0)
        start = Machine(
            name=probed.worker.machine,
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
