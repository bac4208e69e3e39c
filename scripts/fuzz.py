"""Feed the readers of foreign files with inputs that coverage makes grow: ``make fuzz``.

    python scripts/fuzz.py TARGET RUNS [WORK]

Needs atheris. Inputs that break a reader are left in ``WORK/TARGET/found``.
"""

from __future__ import annotations

import atexit
import random
import signal
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["skhead"], enable_loader_override=False):
    import skhead.persistence
    import skhead.weights.basis_store
    import skhead.weights.files  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import fuzzing

#: Seconds after which an input hangs, MiB after which it eats memory, and longest input.
LIMITS = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=8192", "-print_final_stats=1"]


def main() -> None:
    """Run one target for a number of inputs; libFuzzer ends the process."""
    target, runs = sys.argv[1], int(sys.argv[2])
    work = Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp()) / target
    corpus, found, scratch = work / "corpus", work / "found", work / "scratch"
    for directory in (corpus, found, scratch):
        directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzzing.seeds(target, scratch)):
        (corpus / f"seed-{number}").write_bytes(seed)

    def change(given: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.2:
            return atheris.Mutate(given, max_size)
        return fuzzing.mutated(given, rng)[:max_size]

    def one(given: bytes) -> None:
        fuzzing.run(target, given, scratch)

    # libFuzzer's clock for inputs that hang still runs while Python shuts down.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    options = [sys.argv[0], str(corpus), f"-atheris_runs={runs}", f"-artifact_prefix={found}/"]
    atheris.Setup([*options, *LIMITS], one, custom_mutator=change)
    atheris.Fuzz()


main()
