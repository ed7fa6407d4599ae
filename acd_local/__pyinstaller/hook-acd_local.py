"""What PyInstaller does not see: files, modules that are imported by name, llama.cpp's libraries."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, collect_submodules, copy_metadata

import acd_local

_package = Path(acd_local.__file__).parent

hiddenimports = [*acd_local.HOMES, *collect_submodules("acd_local.runtime")]
datas = collect_data_files("acd_local", excludes=["__pyinstaller"])
for _name in ("llama-cpp-python", "llguidance"):  # whose versions are asked for at run time
    with suppress(PackageNotFoundError):
        datas += copy_metadata(_name)
if not (_package / "prompts").is_dir():  # a checkout
    datas.append((str(_package.parent / "prompts"), "acd_local/prompts"))
binaries = collect_dynamic_libs("llama_cpp")

# acd optimize needs these, and the figures of reports matplotlib; for models by hf:... an application adds
# --hidden-import huggingface_hub, which draws in torch where that is installed.
excludedimports = ["torch", "transformers", "accelerate", "gguf", "huggingface_hub", "matplotlib"]
