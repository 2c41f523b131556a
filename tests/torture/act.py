"""Runs the command of the scenario NAME in the folders below BASE: act.py NAME BASE. The recorder logs its writes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.torture.all_scenarios import SCENARIOS
from tests.torture.scenarios import Field, Patched

if __name__ == "__main__":
    scenario, field = SCENARIOS[sys.argv[1]], Field(Path(sys.argv[2]))
    with Patched(scenario, field):
        scenario.act(field)
