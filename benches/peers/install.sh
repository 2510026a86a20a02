#!/bin/bash
# PyTorch, transformers and what they need for the CPU, from PyPI: 2 GB on disk, torch is most of it.
# usage: bash install.sh DIR
set -e
mkdir -p "${1:?a folder}"
D=$(realpath "$1")
HERE=$(cd "$(dirname "$0")" && pwd)
python3 -m venv "$D/venv"
pip() { "$D/venv/bin/pip" install -q --disable-pip-version-check "$@"; }
pip -U setuptools
# --no-deps: torch alone, without several GB of CUDA libraries that a CPU never calls
pip --no-deps torch==2.15.0
pip filelock typing-extensions sympy networkx jinja2 fsspec numpy
pip --no-deps nvidia-cuda-runtime==13.2.86 nvidia-cuda-cupti==13.2.86
"$D/venv/bin/python" "$HERE/make_cuda_stubs.py"
pip transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 psutil
"$D/venv/bin/python" -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
