#!/usr/bin/env bash
# Builds the second environment of the Megatron tests: megatron-core 0.19.2 and its own Muon, on the same Python.
#
#   tests/integrations/setup_megatron_019.sh [.venv-megatron-0.19] [python3]
#
# megatron-core 0.19.2 and emerging-optimizers 0.3.0 declare Python 3.12 but run on 3.11, so their requirements are
# not resolved by pip: what they import is named here.
set -euo pipefail
venv=${1:-.venv-megatron-0.19}
python=${2:-python3}
here=$(cd "$(dirname "$0")/../.." && pwd)

test -x "$venv/bin/python" || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install -c "$here/constraints.txt" setuptools wheel torch
pip install -c "$here/constraints.txt" numpy packaging psutil absl-py typing_extensions triton \
    pytest pytest-timeout pytest-xdist tokenizers safetensors rich tensorboard PyYAML matplotlib
pip install --no-deps --ignore-requires-python megatron-core==0.19.2 emerging-optimizers==0.3.0
pip install --no-deps --no-build-isolation -e "$here"
# emerging-optimizers imports override from typing, where Python 3.11 does not have it; also in helper processes.
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
echo "import typing, typing_extensions; typing.override = typing_extensions.override" > "$site/typing_override.pth"
"$venv/bin/python" -c "from importlib.metadata import version; print('megatron-core', version('megatron-core'))"
