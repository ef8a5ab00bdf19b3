"""What always giving the commonest answer gets: python benchmarks/quality/commonest.py --model MODEL --data DATA.

Writes `commonest.json`: by task, the share of each test whose right option is the commonest one, and their mean.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from quality.plan import read_plan, settings  # noqa: E402
from quality.run import WORK  # noqa: E402
from quality.tasks import prepare  # noqa: E402

FILE = HERE / "commonest.json"
TASKS = ("sst2", "commonsense")
"""Those whose tests have options."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--data", required=True, help="folder with commonsense and sst2")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for tokens")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    plan = read_plan(HERE / "plans" / "main.yaml")
    shares: dict[str, dict[str, float]] = {}
    for task in TASKS:
        file = prepare(task, options.data, tokenizer, settings(plan, task), options.work)
        tests = pickle.loads(Path(file).read_bytes()).tests
        own = {
            name: Counter(each.right for each in test.data).most_common(1)[0][1] / len(test.data)
            for name, test in tests.items()
            if test.protocol == "likelihood"
        }
        shares[task] = {**own, "average": mean(own.values())}
    FILE.write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
