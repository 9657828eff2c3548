"""Spectrum of representations: the eigenvalues of their covariance, on logarithmic axes."""

import numpy as np
from matplotlib.figure import Figure

from simclr_ddp.plots.png import WIDTH

STYLES = (("#0072b2", "solid"), ("#d55e00", "dashed"))  # colour-blind safe (Okabe and Ito 2008)


def spectrum(spectra: dict[str, np.ndarray], title: str) -> Figure:
    """Plot eigenvalues [D], largest first, of each covariance, as shares of their sum.

    spectra  name of the vectors -> eigenvalues; for example of representations h and of embeddings z

    Eigenvalues that are zero up to rounding have no place on a logarithmic axis and are left out.
    """
    figure = Figure(figsize=(WIDTH, 5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axis = figure.add_subplot(xscale="log", yscale="log", xlabel="position", ylabel="share of the variance")
    for (name, values), (colour, dash) in zip(spectra.items(), STYLES, strict=False):
        shares = values / values.sum()
        shares = shares[shares > 1e-12]
        label = f"{name}: {len(shares):,} of {len(values):,} directions are in use"
        axis.plot(np.arange(1, len(shares) + 1), shares, color=colour, linestyle=dash, linewidth=2, label=label)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
