"""What a pruner is to the training loop, by the method that docs/pruner.md shows, as it stands there."""

from pathlib import Path

import pytest
import torch
from oracle import small_vit

import uvc
from uvc.config import Config
from uvc.constraints import limits
from uvc.solver import METHODS, Pruner
from uvc.training.compress import compress
from uvc.training.logger import RunLog

PAGE = Path(__file__).parents[2] / "docs" / "pruner.md"
CODE = PAGE.read_text().split("```python\n")[1].split("```")[0]


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 8, 3, 16, 16, generator=generator)
    return [(batch, torch.randint(0, 5, (8,), generator=generator)) for batch in images]


@pytest.fixture
def shown():
    """The names of the page's code after it ran."""
    torch.manual_seed(0)
    names = {"model": small_vit(), "train_loader": data(), "val_loader": data()[:1]}
    exec(compile(CODE, PAGE.name, "exec"), names)
    yield names
    del METHODS["magnitude"]


def test_the_method_of_the_docs_trains_a_model_to_the_budget(shown):
    result = shown["result"]
    assert 0.49 * result.dense_cost.macs < result.cost.macs <= 0.5 * result.dense_cost.macs
    assert [entry["phase"] for entry in result.history].count("search") == 5


def test_the_method_of_the_docs_removes_the_smallest_norms_in_steps(shown):
    model = uvc.convert(small_vit())
    pruner = METHODS["magnitude"](model, limits(model, 0.5), 20, shown["config"].solver)
    optimizer, costs = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(20):
        pruner.step(optimizer)
        costs.append(uvc.cost(model).macs / pruner.limits[0].dense)
    assert costs[::2] == pytest.approx([1.0 - i / 20 for i in range(10)], abs=0.02)
    for block, mlp in zip(uvc.structure_of(model).blocks, (b.mlp for b in model.blocks), strict=True):
        norms = mlp.fc1.weight.square().sum(1) + mlp.fc1.bias.square() + mlp.fc2.weight.square().sum(0)
        kept = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor(block.neurons), True)
        assert norms[kept].min() > norms[~kept].max()


def test_a_stopped_run_of_it_is_resumed_to_the_bit(shown, tmp_path):
    config = Config(warmup_epochs=0, search_epochs=5, post_epochs=1, solver=shown["config"].solver)

    class Stop(RunLog):
        def note(self, **fields):
            super().note(**fields)
            if self._phase == "search" and fields.get("epoch") == 2:
                raise KeyboardInterrupt

    def run(**options):
        torch.manual_seed(0)
        return compress(small_vit(), data(), data()[:1], 0.5, config=config, out=tmp_path, **options)

    with pytest.raises(KeyboardInterrupt):
        run(log=Stop(tmp_path))
    resumed, whole = run(resume=True), run()
    assert resumed.structure == whole.structure
    pairs = zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_pruner_that_overrides_nothing_leaves_a_model_as_it_is():
    model = uvc.convert(small_vit())
    before, pruner = {n: t.clone() for n, t in model.state_dict().items()}, Pruner(model)
    pruner.before(), pruner.observe(), pruner.step(torch.optim.SGD(model.parameters(), 0.1)), pruner.harden()
    pruner.load_state_dict(pruner.state_dict())
    assert pruner.metrics() == {} and uvc.structure_of(model) == uvc.Structure.dense(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
