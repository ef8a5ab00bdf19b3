"""How a missing module is installed: by an extra of this library, or by its distribution, whose name may be another."""

from __future__ import annotations

import sys

__all__ = ["distribution_of", "how_to_install", "is_of_python", "say_how_to_install"]

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
PLACE = "git+https://github.com/ist-peft/ist-peft"
"""Where pip gets this library, which is not on PyPI."""
DISTRIBUTIONS = {
    "Crypto": "pycryptodome",
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
    "google.protobuf": "protobuf",
    "jwt": "PyJWT",
    "pkg_resources": "setuptools",
    "pynvml": "nvidia-ml-py",
    "ruamel": "ruamel.yaml",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "yaml": "PyYAML",
    "zmq": "pyzmq",
}
"""Modules, and the distributions that bring them, where more than `_` and `-` differs."""
SAME = {
    "accelerate", "aqlm", "bitsandbytes", "blobfile", "causal_conv1d", "clearml", "codecarbon", "comet_ml",
    "compressed_tensors", "dagshub", "deepspeed", "dvclive", "eetq", "einops", "evaluate", "flash_attn", "flytekit",
    "gptqmodel", "hqq", "huggingface_hub", "jinja2", "kernels", "kubeflow", "liger_kernel", "mamba_ssm", "mlflow",
    "neptune", "nltk", "numpy", "optimum", "pandas", "peft", "psutil", "pyarrow", "regex", "requests", "rouge_score",
    "sacrebleu", "safetensors", "scipy", "sentencepiece", "swanlab", "sympy", "tensorboard", "tiktoken", "tokenizers",
    "torch", "torchao", "torchaudio", "torchvision", "tqdm", "trackio", "transformers", "triton", "vllm", "wandb",
    "xformers",
}  # fmt: skip
"""Modules that a distribution of the same name brings, with `-` for `_`; of others nothing is known."""


def how_to_install(module: str) -> str:
    """What brings a module, to follow "install it with" or stand as a command.

    Args:
        module: its name as it is imported, with dots or without.
    """
    top = module.partition(".")[0]
    extra = EXTRAS.get(top)
    return f"pip install 'ist-peft[{extra}] @ {PLACE}'" if extra else f"pip install {distribution_of(module)}"


def say_how_to_install(module: str) -> str:
    """What to do about a missing module, to stand in a sentence: of an unknown one, `pip install` may bring another.

    Args:
        module: its name as it is imported, with dots or without.
    """
    top = module.partition(".")[0]
    if top in EXTRAS or top in SAME or place_of(module):
        return f"install it with {how_to_install(module)}"
    return f"install the package that brings {module}"


def distribution_of(module: str) -> str:
    """The distribution of a module, as `pip install` takes it."""
    return DISTRIBUTIONS.get(place_of(module)) or module.partition(".")[0].replace("_", "-")


def place_of(module: str) -> str:
    """The longest beginning of a module's name that `DISTRIBUTIONS` has, or an empty text."""
    parts = module.split(".")
    places = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((place for place in places if place in DISTRIBUTIONS), "")


def is_of_python(module: str) -> bool:
    """Whether a module comes with Python itself, which may be built without it."""
    return module.partition(".")[0] in sys.stdlib_module_names
