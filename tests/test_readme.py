"""What the README shows works."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES[1:], ids=[page.name for page in PAGES[1:]])
def test_examples_of_pages_run(page: Path) -> None:
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), {})
