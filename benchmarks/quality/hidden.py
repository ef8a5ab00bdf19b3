"""The first import of the process that others are forked from: it keeps CUDA out of what is imported next.

bitsandbytes asks for the compute capability of every GPU when it is imported, as peft does where it is installed. That
initialises CUDA, which no forked process can use then. No training here needs it, so it counts as not installed.
Importing this module has an effect: only that process imports it.
"""

import sys

sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # As Python's documentation has it: no import.
