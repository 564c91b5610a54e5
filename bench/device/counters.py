"""Hardware counters of four kernels, by Nsight Compute."""

from lowrank_sys.bench.device import tool

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats", "Occupancy")
MOST = 80  # launches


def run(setting):
    ncu = tool.installed("ncu", setting)
    sections = [word for name in SECTIONS for word in ("--section", name)]
    options = [*ncu, "--profile-from-start", "off", "--clock-control", "none", "--launch-count", str(MOST), *sections]
    tool.expect(setting, [*(options if ncu else []), *tool.ourselves(setting, "large-calls")])
