"""Published test errors of the models, at 96 rows of history. Data only: importing this imports no torch.

MSE and MAE in scaled units over all test windows, of the protocol that `ForecastData` keeps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure that a paper reports."""

    mse: float
    mae: float
    source: str


SEQ_LEN = 96  # rows of history of all figures

_ITRANSFORMER = "arXiv 2310.06625, table 10"
SOURCES = {
    "itransformer": _ITRANSFORMER,
    "patchtst": _ITRANSFORMER,
    "dlinear": _ITRANSFORMER,
    "autoformer": _ITRANSFORMER,
    "informer": "Time-FFM, table 13",
    "s_mamba": "arXiv 2403.11144, as quoted in HaKAN, table 2",
}

# MSE/MAE by data set and horizon H; "-" where it was not found.
TABLE = """
data_set          H  itransformer  patchtst      dlinear       autoformer    informer      s_mamba
etth1            96  0.386/0.405   0.414/0.419   0.386/0.400   0.449/0.459   0.865/0.713   0.386/0.405
etth1           192  0.441/0.436   0.460/0.445   0.437/0.432   0.500/0.482   1.008/0.792   0.443/0.437
etth1           336  0.487/0.458   0.501/0.466   0.481/0.459   0.521/0.496   1.107/0.809   0.489/0.468
etth1           720  0.503/0.491   0.500/0.488   0.519/0.516   0.514/0.512   1.181/0.865   0.502/0.489
etth2            96  0.297/0.349   0.302/0.348   0.333/0.387   0.346/0.388   3.755/1.525   0.296/0.348
etth2           192  0.380/0.400   0.388/0.400   0.477/0.476   0.456/0.452   5.602/1.931   0.376/0.396
etth2           336  0.428/0.432   0.426/0.433   0.594/0.541   0.482/0.486   4.721/1.835   0.424/0.431
etth2           720  0.427/0.445   0.431/0.446   0.831/0.657   0.515/0.511   3.647/1.625   0.426/0.444
ettm1            96  0.334/0.368   0.329/0.367   0.345/0.372   0.505/0.475   0.672/0.571   0.333/0.368
ettm1           192  0.377/0.391   0.367/0.385   0.380/0.389   0.553/0.496   0.795/0.669   0.376/0.390
ettm1           336  0.426/0.420   0.399/0.410   0.413/0.413   0.621/0.537   1.212/0.871   0.408/0.413
ettm1           720  0.491/0.459   0.454/0.439   0.474/0.453   0.671/0.561   1.166/0.823   0.475/0.448
exchange_rate    96  0.086/0.206   0.088/0.205   0.088/0.218   0.197/0.323   0.847/0.752   -
exchange_rate   192  0.177/0.299   0.176/0.299   0.176/0.315   0.300/0.369   1.204/0.895   -
exchange_rate   336  0.331/0.417   0.301/0.397   0.313/0.427   0.509/0.524   1.672/1.036   -
exchange_rate   720  0.847/0.691   0.901/0.714   0.839/0.695   1.447/0.941   2.478/1.310   -
weather          96  0.174/0.214   0.177/0.218   0.196/0.255   0.266/0.336   0.300/0.384   -
weather         192  0.221/0.254   0.225/0.259   0.237/0.296   0.307/0.367   0.598/0.544   -
weather         336  0.278/0.296   0.278/0.297   0.283/0.335   0.359/0.395   0.578/0.523   -
weather         720  0.358/0.347   0.354/0.348   0.345/0.381   0.419/0.428   1.059/0.741   -
electricity      96  0.148/0.240   0.181/0.270   0.197/0.282   0.201/0.317   0.274/0.368   -
electricity     192  0.162/0.253   0.188/0.274   0.196/0.285   0.222/0.334   0.296/0.386   -
electricity     336  0.178/0.269   0.204/0.293   0.209/0.301   0.231/0.338   0.300/0.394   -
electricity     720  0.225/0.317   0.246/0.324   0.245/0.333   0.254/0.361   0.373/0.439   -
traffic          96  0.395/0.268   0.462/0.295   0.650/0.396   0.613/0.388   -             -
traffic         192  0.417/0.276   0.466/0.296   0.598/0.370   0.616/0.382   -             -
traffic         336  0.433/0.283   0.482/0.304   0.605/0.373   0.622/0.337   -             -
traffic         720  0.467/0.302   0.514/0.322   0.645/0.394   0.660/0.408   -             -
"""


def published(dataset: str, seq_len: int, pred_len: int, model: str) -> Published | None:
    """Return the published figure of a model on a data set, if there is one.

    Args:
        dataset: The data set's name.
        seq_len: Rows of history.
        pred_len: Rows to forecast.
        model: The model's catalogue name.

    Example:
        >>> published("etth1", 96, 96, "itransformer")
        Published(mse=0.386, mae=0.405, source='arXiv 2310.06625, table 10')
    """
    names, *rows = (line.split() for line in TABLE.strip().splitlines())
    if seq_len != SEQ_LEN or model not in SOURCES:
        return None
    for row in rows:
        cell = row[names.index(model)]
        if row[:2] == [dataset, str(pred_len)] and cell != "-":
            mse, mae = map(float, cell.split("/"))
            return Published(mse, mae, SOURCES[model])
    return None
