"""The table of the graph data sets."""

from __future__ import annotations

from manyheads.core.datasets import DataSet, File

_DEEPCHEM = "https://raw.githubusercontent.com/deepchem/deepchem/fbe3b911a94a6eb8c84c1a9e7ac67a472c49ea80"
_FREE_ZINC = "MIT (Jin et al., Dwivedi et al.); ZINC is free to use, large parts are not to be passed on"


def _collection(name: str, summary: str, graphs: int, file: tuple[str, int, str]) -> DataSet:
    path, size, sha256 = file
    return DataSet(
        name=name,
        domain="graph",
        summary=summary,
        licence="MIT (M. Zhang et al.); graphs of the TU collection",
        files=(File(f"graph/tu/{path}.zip", size, sha256),),
        split="10 folds",
        shape=(graphs,),
        columns=("graph", "class"),
    )


DATASETS: tuple[DataSet, ...] = (
    DataSet(
        name="zinc",
        domain="graph",
        summary="ZINC 12k: 10,000 + 1,000 + 1,000 molecules, constrained solubility; train is a substitute",
        licence=_FREE_ZINC,
        files=(
            File(
                "graph/zinc_jtnn/train_10000_from_valid_pool.parquet",
                289809,
                "0d0ad4a1ef3f4908613af7bb8394cc62778be5e985004e5f37a4f404f1bdedb6",
            ),
            File(
                "graph/zinc_jtnn/val_1000.parquet",
                31694,
                "8afe26f76b84d2cd4b15ffddb20464a770e5f34b9f3fd5b761916baf74bf1142",
            ),
            File(
                "graph/zinc_jtnn/test_1000.parquet",
                31536,
                "c9e6af614c9ac4fedb54ff74d91aedf16dae617c584e3d94b828f87e380daf49",
            ),
        ),
        split="given",
        shape=(12000,),
        columns=("smiles", "y", "logp", "neg_sa", "cycle", "num_atoms"),
    ),
    DataSet(
        name="zinc_jtnn",
        domain="graph",
        summary="JTNN's lists: SMILES of 29,445 molecules of ZINC, and which of them are ZINC 12k",
        licence=_FREE_ZINC,
        files=(
            File(
                "graph/zinc_jtnn/jtnn_valid_24445.smi",
                1106144,
                "ad7d9c2bfebd93ffda6c32ed0e89d1714ae1f592f6340c0e6ae057521bbae30d",
            ),
            File(
                "graph/zinc_jtnn/jtnn_test_5000.smi",
                225615,
                "31f6ce92914814db33bf0dbfc45f3836193e27cb80a59c54d88bc05a1f5fab83",
            ),
            File(
                "graph/zinc_jtnn/train.index",
                65110,
                "575d6acd72ac207a95947e2bdd16411ef6fc3faa88c2f55a2c496ea43022a6d8",
            ),
            File(
                "graph/zinc_jtnn/val.index",
                5541,
                "fe48c38157f0d38e7fc441903a143392eda080511a79e8fb8f60f5c1b0a9c164",
            ),
            File(
                "graph/zinc_jtnn/test.index",
                4782,
                "6aa50d98976044fb36089afef5b4c991b429ca1c8e009d33a0319e42a2d9b525",
            ),
        ),
        split="none",
        shape=(29445,),
        columns=("smiles",),
    ),
    DataSet(
        name="cora",
        domain="graph",
        summary="Cora: 2,708 papers by words and 5,278 citations, 7 classes",
        licence="MIT (Z. Yang et al.)",
        files=(
            File(
                "graph/cora.npz",
                102281,
                "a1ac41a581a5c3865ef5a97ebdc1c4d46cd850cb73c7fbce5faba28fd80e8517",
            ),
        ),
        split="given",
        shape=(2708, 1433),
        columns=("x", "class"),
    ),
    DataSet(
        name="cora_planetoid",
        domain="graph",
        summary="Cora in Planetoid's own files, as torch-geometric reads them",
        licence="MIT (Z. Yang et al.)",
        files=(
            File(
                "graph/planetoid_cora_raw.zip",
                131485,
                "fa5a39576a95df2420c2aa13436e18662e81b7bfeb432253421507f4d9d695d7",
            ),
        ),
        split="given",
        shape=(2708, 1433),
    ),
    _collection(
        "mutag",
        "MUTAG: 188 molecules, mutagenic or not",
        188,
        ("MUTAG", 9491, "1c6bb305a18096c697eeb7a8bc605d0b913945135ea70a413f838f274519a120"),
    ),
    _collection(
        "ptc",
        "PTC-MR: 344 molecules, carcinogenic to male rats or not",
        344,
        ("PTC", 25689, "0ccede9c4b441077055f603428510a6e192d6021429b918d2548132808c64f0b"),
    ),
    _collection(
        "proteins",
        "PROTEINS: 1,113 proteins, enzymes or not; nodes are pieces of structure",
        1113,
        ("PROTEINS", 210466, "25ee8cea424ab271078da2a2f10d3988179ccd4664cc241213e51367abfc7598"),
    ),
    _collection(
        "imdb_binary",
        "IMDB-BINARY: 1,000 circles of actors, two genres; nodes have nothing but edges",
        1000,
        ("IMDBBINARY", 101955, "4f7da5ad44c41d7abf46e0f20fd058f9ddceaf2dfd9dbd09f5c108b1d125eef1"),
    ),
    _collection(
        "enzymes",
        "ENZYMES: 600 proteins of 6 classes of enzymes",
        600,
        ("ENZYMES", 83040, "beaf178a354235942e96b37eef806d29e072e4e1886fc0f41b806673b7bea8cd"),
    ),
    DataSet(
        name="esol",
        domain="graph",
        summary="ESOL: 1,128 molecules, solubility in water",
        licence="MIT (deepchem)",
        files=(
            File(
                "graph/esol_delaney.csv",
                96699,
                "8c06a76f0c6487d29ab0f903e6a7a7139f189ab3c1178f159c8be8964602f189",
                f"{_DEEPCHEM}/datasets/delaney-processed.csv",
            ),
        ),
        split="scaffold 8/1/1",
        shape=(1128,),
        columns=("smiles", "measured log solubility in mols per litre"),
    ),
    DataSet(
        name="tox21",
        domain="graph",
        summary="Tox21: 8,014 molecules, 12 tests of toxicity with gaps",
        licence="MIT (deepchem)",
        files=(
            File(
                "graph/tox21.csv",
                536070,
                "1689278aa402ef8da840be1126c547253338d390cc8526714910a3b2a39fa1c9",
                f"{_DEEPCHEM}/datasets/tox21.csv.gz",
            ),
        ),
        split="scaffold 8/1/1",
        shape=(8014, 12),
        columns=("smiles", "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD"),
    ),
    DataSet(
        name="hiv",
        domain="graph",
        summary="HIV: 41,913 molecules, 1,487 of them active against its replication",
        licence="MIT (deepchem)",
        files=(
            File(
                "graph/hiv.csv",
                2195570,
                "d0e985c9c1191c77958ac52a278338c241858394fd3b299f56113329e1fc935c",
                f"{_DEEPCHEM}/examples/hiv/HIV.csv",
            ),
        ),
        split="scaffold 8/1/1",
        shape=(41913,),
        columns=("smiles", "HIV_active"),
    ),
)
