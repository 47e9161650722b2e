"""What the README shows works."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    samples = names["samples"]
    assert isinstance(samples, torch.Tensor)
    assert samples.shape == (16, 1, 8, 8)
    assert samples.isfinite().all()
    assert (tmp_path / "digits-model" / "model.safetensors").is_file()
    # It says that training helps: hold it to that.
    noisy, heldout, model, gaussian = (names[name] for name in ("noisy", "heldout", "model", "gaussian"))
    errors = [(denoiser(noisy, 0.5) - heldout).square().mean() for denoiser in (model, gaussian)]  # pyright: ignore
    assert errors[0] < 0.9 * errors[1]
