"""The chat window over the Python API, frozen by PyInstaller: it answers from the demo model."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from example_programs import EXAMPLES
from places import ROOT, child_env

pytest.importorskip("PyInstaller", reason="PyInstaller is not installed")
pytest.importorskip("PySide6.QtWidgets", reason="PySide6 is not installed", exc_type=ImportError)

pytestmark = pytest.mark.slow

# A user's hands around the example: types a question, waits for the answer, closes the window.
APPLICATION = """
import sys

import api_chat
from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication

application = QApplication(sys.argv[:1])
window = api_chat.open_window(sys.argv[1], ctx_size=128)


def look():
    if window.messages:
        print(window.messages[1]["content"].strip() != "", getattr(sys, "frozen", False))
        window.close()
    elif window.button.isEnabled() and window.button.text() == "Send":
        window.input.setPlainText("Name a colour.")
        window.button.click()


timer = QTimer()
timer.timeout.connect(look)
timer.start(50)
sys.exit(application.exec())
"""


def test_the_frozen_window_answers(tmp_path: Path, demo: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN"]
    command += ["--paths", str(EXAMPLES / "qt"), "application.py"]
    if not any(entry.module.startswith("acd_local.") for entry in metadata.entry_points(group="pyinstaller40")):
        command += ["--additional-hooks-dir", str(ROOT / "acd_local" / "__pyinstaller")]
    env = child_env(PYINSTALLER_CONFIG_DIR=str(tmp_path / "config"), QT_QPA_PLATFORM="offscreen")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "dist" / "application" / "application"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [program, str(demo)],
        env=kept | {"QT_QPA_PLATFORM": "offscreen", "ACD_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    assert not list(program.parent.glob("_internal/torch"))
