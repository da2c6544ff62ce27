"""Partial dependence.

A faint line shows how the prediction for one patient moves with one column while the others stay; the bold line is the
mean. The progress of diabetes rises with body mass (bmi) and blood pressure (bp), and hardly depends on age. The model
is an estimator as scikit-learn defines them, so scikit-learn's inspection draws it.
"""

import matplotlib.pyplot as plt
from sklearn.datasets import load_diabetes
from sklearn.inspection import PartialDependenceDisplay

from fusemlp.sklearn import TableRegressor

patients = load_diabetes(as_frame=True, scaled=False)
columns = ["age", "bmi", "bp"]
model = TableRegressor(random_state=0).fit(patients.data, patients.target)

figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
display = PartialDependenceDisplay.from_estimator(
    model,
    patients.data,
    columns,
    kind="both",
    subsample=60,
    random_state=0,
    ax=panels,
    ice_lines_kw={"color": "C0", "alpha": 0.3, "linewidth": 0.8},
    pd_line_kw={"color": "C1", "linewidth": 2.5, "label": None},
)
for marks in display.deciles_vlines_.ravel():
    marks.set_color("C4")
for axes in panels:
    axes.set_ylabel("")
panels[0].set_ylabel("progress of the disease")
figure.savefig("dependence.png")
