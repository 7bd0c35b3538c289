"""The settings of a run. Each is also an option of `pyrovae train`, and a key of a run's `config.json`."""

from dataclasses import dataclass
from typing import Literal

from pyrovae.data.sources import DATASETS
from pyrovae.estimators import ESTIMATORS
from pyrovae.guides.base import SCALE_HEADS
from pyrovae.guides.registry import GUIDES
from pyrovae.likelihoods import LIKELIHOODS
from pyrovae.likelihoods.bernoulli import BINARIZATIONS
from pyrovae.networks import NETWORKS
from pyrovae.networks.base import ACTIVATIONS
from pyrovae.runs.config.options import option, parse_directory, parse_integers, parse_limit, parse_variance

LONG = 10_000  # steps of training that repay the compilation of one
COMPILE = dict.fromkeys(("auto", "on", "off"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields of `Config`, which checks them."""

    dataset: str = option(
        "digits",
        f"Images: {', '.join(DATASETS)}, or a path to an .npz, a .npy or a folder of image files.",
        short="d",
    )
    data_dir: str | None = option(
        None,
        "Where downloaded datasets lie or go.",
        parse=parse_directory,
        metavar="DIR",
        shown="$PYROVAE_DATA or ~/.cache/pyrovae",
    )
    held_out: int | None = option(
        None,
        "Validation images, taken from the source's training images.",
        parse=int,
        metavar="N",
        shown="a tenth, at most 5,000",
    )
    limit: tuple[int, int | None] | None = option(
        None,
        "Use at most this many training (and validation) images, drawn with the seed.",
        parse=parse_limit,
        metavar="N[/M]",
        shown="all",
    )
    image_size: int | None = option(
        None,
        "Resize and crop a folder's images to this side.",
        parse=int,
        metavar="PIXELS",
        shown="as they are",
    )
    likelihood: str = option("bernoulli", "p(x|z).", short="l", choices=LIKELIHOODS)
    binarize: str | None = option(
        None,
        "How a Bernoulli observes grey pixels; soft is a pseudo-likelihood.",
        choices=BINARIZATIONS,
        shown="stochastic",
    )
    c: float | Literal["learned"] | None = option(
        None,
        "A Gaussian pixel's variance, or 'learned'.",
        parse=parse_variance,
        metavar="VARIANCE",
        shown="0.05",
    )
    levels: int | None = option(
        None,
        "A categorical pixel's grey levels, 2 to 256.",
        parse=int,
        metavar="N",
        shown="17 for digits, 256 elsewhere",
    )
    latent_dim: int = option(2, "Dimensions of z.", short="z")
    network: str = option("mlp", "Encoder and decoder.", choices=NETWORKS)
    hidden: tuple[int, ...] | None = option(
        None,
        "The MLP encoder's hidden widths; the decoder mirrors them.",
        parse=parse_integers,
        metavar="N,N,...",
        shown="300,100,10",
    )
    channels: tuple[int, ...] | None = option(
        None,
        "The CNN encoder's channels; the decoder mirrors them.",
        parse=parse_integers,
        metavar="N,N,...",
        shown="32,64,32",
    )
    activation: str | None = option(None, "Of the hidden layers.", choices=ACTIVATIONS, shown="elu")
    conditional: bool = option(False, "Give the class to the encoder and the decoder: p(x|z, y), q(z|x, y).")
    guide: str = option(
        "mean-field", f"q(z|x): {', '.join(GUIDES)}, or package.module:Class of your own.", metavar="GUIDE"
    )
    scale_head: str | None = option(
        None, "How a network output becomes the guide's variance.", choices=SCALE_HEADS, shown="exp"
    )
    rank: int | None = option(
        None, "Columns of the factor of a low-rank guide.", parse=int, metavar="R", shown="2"
    )
    df: float | None = option(
        None, "Degrees of freedom of a student-t guide, above 2.", parse=float, metavar="DF", shown="5.0"
    )
    components: int | None = option(None, "Gaussians in a mixture.", parse=int, metavar="N", shown="5")
    flow_depth: int | None = option(None, "Steps of iaf and coupling.", parse=int, metavar="N", shown="4")
    flow_width: int | None = option(
        None, "Hidden units of the network of each of these steps.", parse=int, metavar="N", shown="64"
    )
    refine_steps: int | None = option(
        None, "Gradient steps of a refined guide, per image.", parse=int, metavar="N", shown="5"
    )
    refine_lr: float | None = option(
        None, "Their size, of natural gradients.", parse=float, metavar="LR", shown="0.5"
    )
    refine_through: bool | None = option(
        None, "Gradients through these steps, or only to where they start.", parse=bool, shown="True"
    )
    estimator: str = option("elbo", "The bound and its gradient.", choices=ESTIMATORS)
    use_rep: bool | None = option(
        None,
        "Pathwise gradients (the reparameterization trick), or the score function.",
        parse=bool,
        shown="as the estimator does",
    )
    particles: int | None = option(
        None,
        "Monte Carlo samples per image, K.",
        short="K",
        parse=int,
        metavar="K",
        shown="the least that the estimator takes",
    )
    antithetic: bool = option(False, "Draw particles in pairs with opposite noise.")
    alpha: float | None = option(
        None, "The order of the renyi bound, 0 to below 1.", parse=float, metavar="ALPHA", shown="0.5"
    )
    beta: float = option(1.0, "Weight of the KL; at 1 the objective is the ELBO.")
    kl_warmup: int = option(0, "Epochs over which that weight rises linearly.", metavar="EPOCHS")
    epochs: int = option(100, "Passes over the training images.", short="e")
    batch_size: int = option(128, "Images per step.", short="b")
    lr: float = option(1e-3, "Adam's learning rate.")
    patience: int | None = option(
        None,
        "Stop after this many epochs without a better validation objective.",
        parse=int,
        metavar="EPOCHS",
        shown="never",
    )
    seed: int = option(0, "Of weights, noise, data order and subsets.", short="s")
    cuda: bool = option(False, "Run on the GPU.")
    compile: str = option(
        "auto",
        f"Compile the training step; auto does from {LONG:,} steps on, which repay it.",
        choices=COMPILE,
    )
    bf16: bool = option(False, "Products of layers in bfloat16.")
    figure_epochs: tuple[int, ...] = option(
        (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        "Epochs, besides the last, whose reconstructions are pictured.",
        parse=parse_integers,
        metavar="N,N,...",
        shown="1,2,5,10,20,50,100,...",
    )
