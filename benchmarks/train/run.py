"""Run `ist train` with the given flags, and keep its result with the commit and the flags that it was made with.

python benchmarks/train/run.py quickstart-cpu
python benchmarks/train/run.py commonsense-h100 --data_files a.json b.json --max_steps 50 …
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from commit import commit  # noqa: E402
from ist.cli.train.command import train  # noqa: E402
from ist.runs.files import RESULT_FILE, write_json  # noqa: E402
from ist.runs.history import HISTORY_FILE  # noqa: E402


def main(name: str, flags: list[str], results: Path = HERE / "results") -> Path:
    """Run, and write `NAME.json` and the history, `NAME.jsonl`, into the folder `results`."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [*flags, "--output_dir", folder] if flags else ["--recipe", "quickstart", "--output_dir", folder]
        revision = commit()
        train(command)
        result = json.loads((Path(folder) / RESULT_FILE).read_text(encoding="utf-8"))
        # Names of files are kept, the folders of one machine are not.
        shown = ["/".join(Path(flag).parts[-2:]) if Path(flag).is_file() else flag for flag in flags]
        del result["arguments"]
        result = {"name": name, "flags": shown, "commit": revision, **result}
        file = results / f"{name}.json"
        write_json(file, result)
        if (Path(folder) / HISTORY_FILE).exists():
            shutil.copy(Path(folder) / HISTORY_FILE, results / f"{name}.jsonl")
    return file


if __name__ == "__main__":
    arguments = sys.argv[1:]
    where = {}
    if "--results" in arguments:
        position = arguments.index("--results")
        where = {"results": Path(arguments.pop(position + 1))}
        arguments.pop(position)
    print(main(arguments[0], arguments[1:], **where))
