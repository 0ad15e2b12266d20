"""Records what LightGBM answers, for machines that lack it: `python -m tests.golden_trees` (extra `train`), seed 7."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import orjson

GOLDEN = Path(__file__).parent / "unit" / "golden_trees.json"
SEED = 7
CASES: dict[str, dict[str, Any]] = {
    "missing values": {},
    "zero as missing": {"zero_as_missing": True},
    "no missing": {"use_missing": False},
    "categories": {"max_cat_to_onehot": 1, "min_data_per_group": 5, "cat_smooth": 1.0},
    "sigmoid": {"sigmoid": 1.7},
    "constant": {"min_data_in_leaf": 10_000},
}


def cases(rounds: int = 12, rows: int = 1_500, shown: int = 120) -> list[dict[str, Any]]:
    """Models over five numbers and one category, with their answers for rows that hold NaN and zeros."""
    import lightgbm
    import numpy as np

    rng = np.random.default_rng(SEED)
    found = []
    for name, parameters in CASES.items():
        x = rng.normal(size=(rows, 6)).round(2)
        x[rng.random(x.shape) < 0.15] = 0.0
        x[rng.random(x.shape) < 0.15] = np.nan
        x[:, 5] = rng.integers(0, 40, rows)
        x[rng.random(rows) < 0.1, 5] = np.nan
        odds = np.nan_to_num(x[:, 0]) + np.isnan(x[:, 1]) + (x[:, 5] % 3 == 0) + (x[:, 2] == 0)
        y = (odds + rng.normal(size=rows) > 1).astype(int)
        booster = lightgbm.train(
            {"objective": "binary", "num_leaves": 15, "verbosity": -1, "seed": SEED, "num_threads": 1} | parameters,
            lightgbm.Dataset(x, y, categorical_feature=[5]),
            rounds,
        )
        asked = x[:shown].copy()
        asked[rng.random(asked.shape) < 0.2] = np.nan
        asked[0, :5] = 1e-36
        asked[1, :5] = 1e-35
        asked[2, 5] = 63
        values = [[None if np.isnan(v) else float(v) for v in row] for row in asked]
        found.append(
            {
                "name": name,
                "categories": [5],
                "text": booster.model_to_string().split("\nend of trees")[0],
                "values": values,
                "raw": booster.predict(asked, raw_score=True).tolist(),
                "probability": booster.predict(asked).tolist(),
            }
        )
    return found


if __name__ == "__main__":
    GOLDEN.write_bytes(orjson.dumps(cases()))
    sys.stdout.write(f"seed {SEED}: {GOLDEN} has {GOLDEN.stat().st_size:,} bytes\n")
