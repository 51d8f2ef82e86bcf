"""PSNR after a whole fit, in lanes and in torch, for several seeds: do the engines differ less than seeds do?

``python benchmarks/engines_agree.py PICTURE OUT.jsonl``: one line for each fit, appended as it ends; what is there is
not done again. Then the summary that docs/engine.md quotes.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import lipfast._C as _C
from lipfast import images, priors, tasks
from lipfast.bench import harness
from lipfast.fit import FitConfig, fit

SIDE = 64  # px
STEPS = 1000
SEEDS = range(6)
SIGMA = 25.0  # grey levels of 255
ENGINES = {"lanes": "auto", "torch": "torch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for seed in SEEDS:
        for engine in ENGINES:
            if not any(row["seed"] == seed and row["engine"] == engine for row in rows):
                rows.append(fitted(arguments.picture, seed, engine))
                with arguments.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    summarise(rows)


def fitted(path: Path, seed: int, engine: str) -> dict[str, object]:
    """One fit of the paper's network to the noisy picture, which is the same for all."""
    clean = images.shrink_to_square(images.read(path), SIDE)
    task = tasks.Denoise(SIGMA)
    observed = task.degrade(clean, torch.Generator().manual_seed(0))
    config = FitConfig.for_task(task, iterations=STEPS, seed=seed)
    network = priors.build("skip", {}, seed)
    result = fit(network, task, observed, config=config, clean=clean, engine=ENGINES[engine])
    return {
        "picture": path.name,
        "side": SIDE,
        "sigma": SIGMA,
        "steps": STEPS,
        "seed": seed,
        "engine": engine,
        "last_psnr": result.last.psnr,
        "oracle_psnr": result.oracle.psnr if result.oracle else None,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": harness.commit(),
    }


def summarise(rows: list[dict[str, object]]) -> None:
    for figure in ("last_psnr", "oracle_psnr"):
        found = {(row["seed"], row["engine"]): float(str(row[figure])) for row in rows}
        differences = [found[seed, "lanes"] - found[seed, "torch"] for seed in SEEDS]
        print(f"{figure}: lanes minus torch {', '.join(f'{d:+.2f}' for d in differences)} dB", end="; ")
        print(f"mean {statistics.mean(differences):+.3f} dB", end="; ")
        for engine in ENGINES:
            values = [found[seed, engine] for seed in SEEDS]
            spread = statistics.stdev(values)
            print(f"{engine} {statistics.mean(values):.2f} dB, deviation between seeds {spread:.2f} dB", end="; ")
        print(f"root mean square of the differences {statistics.mean(d * d for d in differences) ** 0.5:.2f} dB")


if __name__ == "__main__":
    main()
