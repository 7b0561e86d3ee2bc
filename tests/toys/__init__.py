"""A way to round weights and a dtype that the package does not know, through every stage that concerns them.

They are in the tables before anything else is imported, and so run in a process of their own (`test_rows.py`).
"""

from fope_export.dtypes import DTYPES, FP16, FP32, Dtype
from fope_export.quantizations import QUANTIZATIONS, Quantization, Since

TOY = Quantization(
    name="toy", element="INT8", home="tests.toys.way", dtypes=(FP32, FP16), growth=0.02, since=(Since((99, 0), FP16),),
    engines=True, architecture=89, product="toys",
)  # fmt: skip
WIDE = Dtype(name="wide", precision="float64", element="double", itemsize=8, apart=1e-4, widened=FP32, architecture=89)
QUANTIZATIONS[TOY.name], DTYPES[WIDE.name] = TOY, WIDE
