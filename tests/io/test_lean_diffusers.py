"""The quick import of diffusers beside packages that it looks for: none of them keeps sdcli from starting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import sys
from sdcli.io.lean_diffusers import UNet2DConditionModel, UNet2DModel, AutoencoderKL
from diffusers.utils import import_utils
print(len(UNet2DConditionModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
    up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=8, cross_attention_dim=8).state_dict()))
print(import_utils._transformers_available, "transformers" in sys.modules)
"""
OPTIONAL = (
    *("torchao", "bitsandbytes", "xformers", "flash_attn", "sageattention", "optimum", "gguf", "kernels"),
    *("modelopt", "auto_round", "timm", "flashinfer", "sdnq", "onnxruntime"),
)
"""Packages that diffusers or transformers look for."""


def install_stub(folder: Path, name: str, source: str) -> None:
    """Write a package with metadata, as pip would install it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    (info / "top_level.txt").write_text(f"{name}\n")


def imported(*folders: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(one) for one in (REPOSITORY, *folders))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_optional_packages_that_need_all_of_torch_do_not_end_the_start(tmp_path: Path) -> None:
    """Each of them imports torch._dynamo.utils, which the stand-in does not have, and reports that it was imported."""
    for name in OPTIONAL:
        install_stub(tmp_path, name, "import torch._dynamo.utils\nprint('imported', __name__)\n")
    done = imported(tmp_path)
    assert done.returncode == 0, done.stderr
    parameters, transformers = done.stdout.splitlines()
    assert int(parameters) > 0
    assert transformers == "True False", "transformers is there and has not been imported"
    assert done.stderr == ""


AFTERWARDS = """
import sys
from pathlib import Path
from sdcli.io.lean_diffusers import UNet2DModel, torch
left_out = {"accelerate", "requests", "huggingface_hub.hf_api", "diffusers.utils.dynamic_modules_utils"}
assert not left_out & set(sys.modules), left_out & set(sys.modules)
small = dict(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
unet = UNet2DModel(layers_per_block=1, norm_num_groups=8, **small)
unet.save_pretrained("unet")
again = UNet2DModel.from_pretrained("unet")  # through accelerate
assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))
unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")  # through diffusers.hooks and accelerate
try:
    UNet2DModel.from_pretrained("somebody/nothing")  # through the hub, offline
except OSError as error:
    assert "somebody/nothing" in str(error)
import accelerate, diffusers, huggingface_hub, requests
from diffusers.utils import load_image, remote_utils
assert isinstance(accelerate.Accelerator, type) and isinstance(huggingface_hub.ModelCard, type)
assert callable(diffusers.hooks.apply_faster_cache)
try:
    load_image("http://127.0.0.1:9/a.png")
except requests.exceptions.ConnectionError:
    print("refused")
from diffusers.utils.import_utils import _is_package_available
print(_is_package_available("PIL", get_dist_name=True))
"""


@pytest.mark.slow
def test_what_was_left_out_at_the_start_is_there_when_it_is_needed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", AFTERWARDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused, pillow = done.stdout.splitlines()[-2:]
    assert refused == "refused"
    assert pillow.startswith("(True, '1")


@pytest.mark.slow
def test_a_package_that_breaks_the_quick_import_gives_the_ordinary_one_and_a_note(tmp_path: Path) -> None:
    """accelerate is needed, so it is not hidden; here a module that it imports does not stand the stand-in."""
    install_stub(tmp_path, "sitecustomize", "")
    (tmp_path / "sitecustomize" / "__init__.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        stand_in = getattr(sys.modules.get('torch._dynamo'), '__spec__', 1) is None\n"
        "        if name == 'diffusers.models.modeling_utils' and stand_in:\n"
        "            raise RuntimeError('a package that nobody knew')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = imported(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "note: " in done.stderr
    assert "a package that nobody knew" in done.stderr
    assert int(done.stdout.splitlines()[0]) > 0


@pytest.mark.slow
def test_the_real_torchao_beside_it_changes_nothing(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, "torchao"]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("torchao cannot be installed here: no package index")
    done = imported(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "True False"
    assert "note" not in done.stderr
