"""How a missing module is installed: by an extra of this library, or by its distribution, whose name may be another."""

from __future__ import annotations

import sys

__all__ = ["distribution_of", "how_to_install", "is_of_python"]

EXTRAS = {
    "trl": "train",
    "datasets": "train",
    "rich": "train",
    "yaml": "train",
    "lm_eval": "eval",
    "gguf": "quickstart",
    "matplotlib": "report",
    "mpl_toolkits": "report",
}
"""Modules that an extra of this library brings, and which."""
DISTRIBUTIONS = {
    "IPython": "ipython",
    "Levenshtein": "levenshtein",
    "OpenSSL": "pyOpenSSL",
    "PIL": "Pillow",
    "absl": "absl-py",
    "antlr4": "antlr4-python3-runtime",
    "attr": "attrs",
    "awq": "autoawq",
    "azureml": "azureml-core",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "fitz": "PyMuPDF",
    "fla": "flash-linear-attention",
    "git": "GitPython",
    "google": "protobuf",
    "google.protobuf": "protobuf",
    "jwt": "PyJWT",
    "pkg_resources": "setuptools",
    "pynvml": "nvidia-ml-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "yaml": "PyYAML",
    "zmq": "pyzmq",
}
"""Modules, and the distributions that bring them, where more than `_` and `-` differs."""


def how_to_install(module: str) -> str:
    """What brings a module, to follow "install it with" or stand as a command.

    Args:
        module: its name as it is imported, with dots or without.
    """
    top = module.partition(".")[0]
    extra = EXTRAS.get(top)
    return f"pip install 'ist-peft[{extra}]'" if extra else f"pip install {distribution_of(module)}"


def distribution_of(module: str) -> str:
    """The distribution of a module, as `pip install` takes it."""
    parts = module.split(".")
    places = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((DISTRIBUTIONS[place] for place in places if place in DISTRIBUTIONS), parts[0].replace("_", "-"))


def is_of_python(module: str) -> bool:
    """Whether a module comes with Python itself, which may be built without it."""
    return module.partition(".")[0] in sys.stdlib_module_names
