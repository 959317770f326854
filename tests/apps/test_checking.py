"""What is wrong with a training's arguments and configs is said in a line, with the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyheads.apps import checking, cli, options
from manyheads.core.catalog import DOMAINS, tasks
from manyheads.core.errors import UsageError

ON_CORA = ("graph", "fit", "--config", "gcn_cora")
COMMAND_LINE = {
    ("--model.optimizer.lerning_rate", "1"): "did you mean '--model.optimizer.learning_rate'?",
    ("--model.optimizer.lerning_rate=1",): "did you mean '--model.optimizer.learning_rate'?",
    ("--trainer.max_epochs", "two"): "--trainer.max_epochs takes a whole number, not 'two'",
    ("--trainer.max_epochs=2.5",): "--trainer.max_epochs takes a whole number, not '2.5'",
    ("--trainer.max_epochs",): "--trainer.max_epochs needs a value",
    ("--trainer.max_epochs", "--overwrite", "true"): "--trainer.max_epochs needs a value",
    ("--model.optimizer.weight_decay", "small"): "takes a number, not 'small'",
    ("--model.optimizer.schedule", "cosin"): "did you mean 'cosine'?",
    ("--trainer.deterministic", "maybe"): "takes true or false, not 'maybe'",
    ("--model.name", "kipf_gnc"): "no graph model 'kipf_gnc'; did you mean 'kipf_gcn'?",
    ("--model.name", "itransformer"): "no graph model 'itransformer'",
    (
        "--model.arguments.hiden_dim",
        "3",
    ): "kipf_gcn takes no argument 'hiden_dim'; did you mean 'hidden_dim'?",
    ("--task", "grpah"): "no graph task 'grpah'; did you mean 'graph'?",
    ("stray",): "takes no 'stray'",
    ("--config", "gcn_corra"): "no graph config 'gcn_corra'; did you mean 'gcn_cora'?",
}
CONFIGS = {
    "trainer: {max_epochss: 2}": "unknown key 'trainer.max_epochss'; did you mean 'trainer.max_epochs'?",
    "model: {optimizer: {lerning_rate: 0.1}}": "did you mean 'model.optimizer.learning_rate'?",
    "modle: {name: kipf_gcn}": "unknown key 'modle'; did you mean 'model'?",
    "model: {name: kipf_gcn, arguments: {hiden_dim: 4}}": "did you mean 'hidden_dim'?",
    "trainer: {max_epochs: many}": "trainer.max_epochs takes a whole number, not 'many'",
    "trainer: {max_epochs: true}": "trainer.max_epochs takes a whole number, not 'true'",
    "trainer: {max_epochs: [1, 2]}": "trainer.max_epochs takes a whole number, not '[1, 2]'",
    "model: {best_by: los}": "model.best_by takes figure or loss, not 'los'; did you mean 'loss'?",
    "task: grpah": "no graph task 'grpah'; did you mean 'graph'?",
    "model: {name: kipf_gcn\ndata: [": "line 2, column 5: this is no YAML",
    "- 1": "a config is a mapping of options",
}


def answer(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("args", COMMAND_LINE)
def test_a_slip_on_the_command_line(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND_LINE[args] in answer((*ON_CORA, *args), capsys)


@pytest.mark.parametrize("content", CONFIGS)
def test_a_slip_in_a_config(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(content)
    said = answer(("graph", "fit", "--config", str(config)), capsys)
    assert CONFIGS[content] in said


def test_a_later_configs_arguments_stand_for_an_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("model: {name: gps, arguments: null}\n")
    (tmp_path / "more.yaml").write_text("model: {best_by: loss}\n")
    others = [arg for name in ("other", "more") for arg in ("--config", str(tmp_path / f"{name}.yaml"))]
    checking.check("graph", ["fit", "--config", "gcn_cora", *others])
    with pytest.raises(UsageError, match="gps takes no argument 'hidden_dims'"):
        checking.check(
            "graph", ["fit", "--config", "gcn_cora", *others, "--model.arguments.hidden_dims", "3"]
        )


@pytest.mark.parametrize("kind", ["int", "float", "int | float", "float | null", "bool", "Literal['a', 'b']"])
def test_values_that_fit_and_others(kind: str) -> None:
    good = {"int": [3, "3", "-1"], "bool": [True, "false", "Yes"], "Literal['a', 'b']": ["a", "b"]}
    for value in good.get(kind, [3, 0.5, "1e-3", "inf"]):
        assert not checking.wrong(kind, value)
    assert checking.wrong(kind, "neither")
    assert checking.wrong(kind, [1])


def test_a_type_that_is_not_known_here_is_left_to_the_parser() -> None:
    for kind in ("str", "list[int]", "Union[int, Literal['auto']]", "Optional[list[str]]", ""):
        assert not checking.wrong(kind, "anything")
    assert (
        checking.wrong("Optional[Literal['zinc', 'ogb']]", "zink")
        == "takes zinc or ogb, not 'zink'; did you mean 'zinc'?"
    )


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_shipped_config_is_right(domain: str) -> None:
    assert options.configs(domain)
    for name in options.configs(domain):
        action, task, rest = checking.check(domain, ["fit", "--config", name, "--trainer.max_epochs", "2"])
        assert (action, task.name in tasks(domain)) == ("fit", True)
        assert rest == [
            "--config",
            str(options.CONFIGS / domain / f"{name}.yaml"),
            "--trainer.max_epochs",
            "2",
        ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_table_of_options_has_every_line_of_the_help(domain: str) -> None:
    for task in tasks(domain):
        found = options.table(domain, task)
        help = options.help_text(domain, "fit", task)
        listed = {
            word.split("=")[0]
            for line in help.split("\n\n", 1)[0].split("[--")[1:]
            for word in line.split()[:1]
        }
        assert {f"--{name.strip('[]+')}" for name in listed} <= set(found)
        assert found["--trainer.max_epochs"] == "int"
        assert found["--model.name"] == "str"
        assert found["--model"] == ""
        untyped = [name for name, kind in found.items() if not kind]
        assert all(
            any(other.startswith(f"{name}.") for other in found)
            for name in untyped
            if name not in ("--config", "--print_config")
        )


def test_no_config_is_an_error_that_lists_them() -> None:
    with pytest.raises(UsageError, match=r"--config is needed: a file, or one of .*gcn_cora"):
        checking.check("graph", ["fit"])
