"""The example runs and draws what it says."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "time_slice.py"


def test_the_example_draws_a_timeline(tmp_path):
    picture = tmp_path / "timeline.svg"
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), str(picture)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ran.stdout.count("to the autoscaler") == 2
    bars = ET.parse(picture).getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len({bar.get("fill") for bar in bars}) == 4
