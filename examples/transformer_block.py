"""A transformer's block with layer norm and with RMS norm, and dropout that can be repeated, on short texts.

Which library has this in its documentation: "Return the discrete Fourier transform sample frequencies."? The texts are
the first sentences of the docstrings of NumPy, SciPy, scikit-learn and matplotlib, as they are installed, without the
libraries' names; those of a quarter of the files are held out. The network has one block, of attention and a
perceptron with a norm before each (pre-norm). It is trained with either norm, and once more without dropout. Beside it
stands naive Bayes, which only counts words: for so few texts that is hard to beat.

Before that the block is run again on its way back, where it has kept nothing but its input, and dropout starts from the
state that its generator had: the gradients have to be the same, to the last bit.

    pip install '.[examples]'
    python examples/transformer_block.py
"""

import re
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import cupybn.functional as F
import layers
from cupybn import Generator, LayerNorm, RMSNorm
from layers import to_numpy, xp

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib")
NAMES = {*LIBRARIES, "scikit"}  # words that would tell the answer
SHORTEST, LONGEST = 3, 16  # words of a text; longer ones are cut
WIDTH, HEADS, HIDDEN = 32, 4, 64  # of a word's vector, of attention, of the perceptron
P = 0.5  # probability of dropout
EPOCHS, SEEDS, BATCH_SIZE, LEARNING_RATE = 4, 3, 64, 5e-3
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
GAIN = 0.25  # least gain in accuracy over the guess that is right most often


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def sentences(library):
    """First sentences of the docstrings of a library's files, as words: for each file a list of tuples."""
    folder = Path(find_spec(library).origin).parent
    found = []
    for file in sorted(folder.rglob("*.py")):
        if not {"tests", "externals"} & set(file.relative_to(folder).parts):
            docstrings = re.findall(r'"""(.*?)"""', file.read_text(errors="replace"), re.DOTALL)
            firsts = [" ".join(text.split("\n\n")[0].split()) for text in docstrings]
            whole = [re.findall("[a-z]+", first.lower()) for first in firsts if re.fullmatch(r"[A-Z][^.]*\.", first)]
            found.append([tuple(words) for words in whole if len(words) >= SHORTEST])
    return found


def load(rng):
    """Texts and labels to learn from, and those held out. No text is there twice, or in two libraries."""
    files = {library: sentences(library) for library in LIBRARIES}
    known = {library: {words for file in files[library] for words in file} for library in LIBRARIES}
    learned, held_out = [], []
    for label, library in enumerate(LIBRARIES):
        seen = set().union(*(known[other] for other in LIBRARIES if other != library))
        order = rng.permutation(len(files[library]))
        for place, file in enumerate(order):
            part = held_out if 4 * place < len(order) else learned
            for words in files[library][file]:
                if words not in seen:
                    part.append(([word for word in words if word not in NAMES][:LONGEST], label))
                    seen.add(words)
    return [([words for words, _ in part], np.array([label for _, label in part])) for part in (learned, held_out)]


def vocabulary(texts):
    """Codes of the words that are there more than once. 0 is for padding, and 1 for all other words."""
    words, counts = np.unique([word for text in texts for word in text], return_counts=True)
    return {str(word): code for code, word in enumerate(words[counts > 1], 2)}


def encode(texts, codes):
    rows = np.zeros((len(texts), LONGEST), int)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = [codes.get(word, 1) for word in text]
    return xp.asarray(rows)


def naive_bayes(learned, held_out):
    """Held-out accuracy of counting words."""
    (x, labels), (x_test, labels_test) = learned, held_out
    size = x.max() + 1
    counts, counts_test = (np.array([np.bincount(row, minlength=size)[1:] for row in rows]) for rows in (x, x_test))
    found = np.array([counts[labels == label].sum(axis=0) + 1 for label in range(len(LIBRARIES))])
    log_p = np.log(found / found.sum(axis=1, keepdims=True))
    guesses = (counts_test @ log_p.T + np.log(np.bincount(labels))).argmax(axis=1)
    return (guesses == labels_test).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Embedding(layers.Layer):
    """A vector of each word plus one of its place: (N, L) to (N, L, C)."""

    names = ("words", "places")

    def __init__(self, rng, size):
        self.words = xp.asarray(rng.normal(0, 0.1, (size, WIDTH)), xp.float32)
        self.places = xp.asarray(rng.normal(0, 0.1, (LONGEST, WIDTH)), xp.float32)

    def vjp(self, codes):
        def vjp_fn(dy):
            dwords = xp.zeros_like(self.words)
            xp.add.at(dwords, codes, dy)
            return None, dwords, dy.sum(axis=0)

        return self.words[codes] + self.places, vjp_fn


class Attention(layers.Layer):
    """Attention of all words of a text to each other, in several heads: (N, L, C) to (N, L, C)."""

    def __init__(self, rng):
        self.project = layers.Linear(rng, WIDTH, 3 * WIDTH)  # queries, keys and values
        self.out = layers.Linear(rng, WIDTH, WIDTH)

    def parameters(self):
        return [*self.project.parameters(), *self.out.parameters()]

    def vjp(self, x, there):
        """``there`` is True where there are words, not padding: nobody looks at the others."""
        N, L, C = x.shape
        scale = (C // HEADS) ** -0.5
        projected, project_vjp = self.project.vjp(x)
        q, k, v = projected.reshape(N, L, 3, HEADS, -1).transpose(2, 0, 3, 1, 4)  # (N, HEADS, L, C / HEADS) each
        scores = xp.where(there[:, None, None], scale * (q @ k.swapaxes(2, 3)), -xp.inf)
        p = xp.exp(scores - scores.max(axis=3, keepdims=True))
        p /= p.sum(axis=3, keepdims=True)
        y, out_vjp = self.out.vjp((p @ v).swapaxes(1, 2).reshape(N, L, C))

        def vjp_fn(dy):
            dh, *dout = out_vjp(dy)
            dh = dh.reshape(N, L, HEADS, -1).swapaxes(1, 2)
            dp = dh @ v.swapaxes(2, 3)
            dscores = scale * p * (dp - (dp * p).sum(axis=3, keepdims=True))
            dqkv = xp.stack([dscores @ k, dscores.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dh])
            dx, *dproject = project_vjp(dqkv.transpose(1, 3, 0, 2, 4).reshape(N, L, 3 * C))
            return dx, *dproject, *dout

        return y, vjp_fn


class ReLU(layers.Layer):
    """The larger of x and 0."""

    def vjp(self, x):
        return xp.maximum(x, 0), lambda dy: (dy * (x > 0),)


class Block(layers.Layer):
    """x + dropout(attention(norm1(x))), and of that h + dropout(mlp(norm2(h))). Both dropouts share a generator."""

    def __init__(self, rng, norm, p, generator):
        self.norm1, self.norm2 = NORMS[norm](WIDTH), NORMS[norm](WIDTH)
        self.attention = Attention(rng)
        self.mlp = layers.Sequential(layers.Linear(rng, WIDTH, HIDDEN), ReLU(), layers.Linear(rng, HIDDEN, WIDTH))
        self.parts = (self.norm1, self.attention, self.norm2, self.mlp)
        self.p, self.generator, self.training = p, generator, True

    def parameters(self):
        return [parameter for part in self.parts for parameter in part.parameters()]

    def dropout(self, x):
        return F.dropout_vjp(x, self.p, self.training, generator=self.generator)

    def vjp(self, x, there):
        h, norm1_vjp = self.norm1.vjp(x)
        h, attention_vjp = self.attention.vjp(h, there)
        h, dropout1_vjp = self.dropout(h)
        x = x + h
        h, norm2_vjp = self.norm2.vjp(x)
        h, mlp_vjp = self.mlp.vjp(h)
        h, dropout2_vjp = self.dropout(h)

        def vjp_fn(dy):
            dh, *dmlp = mlp_vjp(dropout2_vjp(dy).input)
            dx, *dnorm2 = norm2_vjp(dh)
            dy = dy + dx
            dh, *dattention = attention_vjp(dropout1_vjp(dy).input)
            dx, *dnorm1 = norm1_vjp(dh)
            return dy + dx, *dnorm1, *dattention, *dnorm2, *dmlp

        return x + h, vjp_fn

    def recomputed_vjp(self, x, there):
        """Output and way back, which keeps x alone: it runs the block again, where dropout drops the same again."""
        drawn = self.generator.state.copy()
        y = self(x, there=there)

        def vjp_fn(dy):
            now = self.generator.state.copy()
            self.generator.state[...] = drawn
            _, block_vjp = self.vjp(x, there)
            self.generator.state[...] = now
            return block_vjp(dy)

        return y, vjp_fn


class Network(layers.Layer):
    """Embedding, dropout, a block, a norm, the mean over the words of each text, and scores."""

    def __init__(self, norm, p, size, seed):
        rng = np.random.default_rng(seed)
        self.embedding, self.block = Embedding(rng, size), Block(rng, norm, p, Generator(seed))
        self.norm, self.scores = NORMS[norm](WIDTH), layers.Linear(rng, WIDTH, len(LIBRARIES))
        self.parts = (self.embedding, self.block, self.norm, self.scores)

    def parameters(self):
        return [parameter for part in self.parts for parameter in part.parameters()]

    def train(self, mode=True):
        self.block.train(mode)  # the norms do the same in both modes
        return self

    def vjp(self, codes):
        there = codes > 0
        x, embedding_vjp = self.embedding.vjp(codes)
        x, dropout_vjp = self.block.dropout(x)
        x, block_vjp = self.block.vjp(x, there)
        x, norm_vjp = self.norm.vjp(x)
        share = (there / there.sum(axis=1, keepdims=True)).astype(x.dtype)[:, :, None]
        scores, scores_vjp = self.scores.vjp((x * share).sum(axis=1))

        def vjp_fn(dy):
            dmean, *dscores = scores_vjp(dy)
            dx, *dnorm = norm_vjp(dmean[:, None] * share)
            dx, *dblock = block_vjp(dx)
            return *embedding_vjp(dropout_vjp(dx).input), *dblock, *dnorm, *dscores

        return scores, vjp_fn


class Adam:
    """Kingma and Ba (2015): steps of the learning rate's size, by means of the gradients and of their squares."""

    def __init__(self, parameters, learning_rate, beta1=0.9, beta2=0.99, eps=1e-8):
        self.parameters, self.learning_rate, self.settings, self.steps = (
            parameters,
            learning_rate,
            (beta1, beta2, eps),
            0,
        )
        self.means = [(xp.zeros_like(parameter), xp.zeros_like(parameter)) for parameter in parameters]

    def step(self, grads):
        beta1, beta2, eps = self.settings
        self.steps += 1
        for parameter, (mean, square), grad in zip(self.parameters, self.means, grads, strict=True):
            mean += (1 - beta1) * (grad - mean)
            square += (1 - beta2) * (grad * grad - square)
            root = xp.sqrt(square / (1 - beta2**self.steps)) + eps
            parameter -= self.learning_rate / (1 - beta1**self.steps) * mean / root


# ---------------------------------------------------------------------------------------------------------------------
# Recomputation, training, picture


def memory_in_use():
    return tracemalloc.get_traced_memory()[0] if xp is np else xp.get_default_memory_pool().used_bytes()


def recompute(block, x, there):
    """Print what the block keeps for its way back, and what if it is run again. Returns if gradients are the same."""
    results, kept = [], []
    block(x, there=there)  # what is made at the first call, such as kernels, is there from now on
    for vjp in (block.vjp, block.recomputed_vjp):
        block.generator.manual_seed(0)
        tracemalloc.start()
        before = memory_in_use()
        y, vjp_fn = vjp(x, there)
        kept.append((memory_in_use() - before - y.nbytes) / x.nbytes)
        tracemalloc.stop()
        results.append([y, *vjp_fn(y)])
    print("The block keeps {:.1f} arrays of its input's size for its way back, {:.1f} if it is run again".format(*kept))
    return all(bool((one == other).all()) for one, other in zip(*results, strict=True))


def accuracy(network, x, labels):
    return float((network.eval()(x).argmax(axis=1) == labels).mean())


def train(network, data, epochs, seed, progress):
    """Train a network. Returns the training loss, and the accuracy on either part of the texts, of every epoch."""
    (x, labels), test = data
    rng = np.random.default_rng(seed)
    optimizer = Adam(network.parameters(), LEARNING_RATE)
    history = []
    for epoch in range(epochs):
        optimizer.learning_rate = LEARNING_RATE * (1 - epoch / epochs)
        loss = layers.train_epoch(network.train(), optimizer, x, labels, BATCH_SIZE, rng)
        history.append((loss, accuracy(network, x, labels), accuracy(network, *test)))
        progress.set_postfix(loss=f"{loss:.3f}", held_out=f"{history[-1][-1]:.1%}")
        progress.update()
    return history


def draw(folder, histories, guesses):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("Training loss", "Accuracy, texts learned from", "Accuracy, texts held out")
    for column, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        styles = zip(("o-", "s--", "^-"), ("#1f77b4", "#d62728", "#7f7f7f"), strict=True)
        for (name, found), (style, colour) in zip(histories.items(), styles, strict=False):
            values = found[:, :, column] * (100 if column else 1)
            epochs = range(1, values.shape[1] + 1)
            ax.plot(epochs, values.mean(axis=0), style, color=colour, label=name, markersize=4)
            ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
        ax.set(title=title, xlabel="epoch", ylabel="%" if column else "cross entropy")
        ax.title.set_fontsize(10)
        ax.set_xticks(epochs)
    for name, level in guesses.items():
        axes[2].axhline(100 * level, color="0.3", ls="--", lw=1)
        axes[2].text(len(epochs), 100 * level + 0.7, name, ha="right", fontsize=8, color="0.3")
    axes[2].margins(y=0.15)
    axes[0].legend(fontsize=8)
    layers.save_picture(figure, folder / "transformer_block.png", dpi=80)


def main():
    args = layers.options(
        __doc__,
        "the picture",
        choices={"norm": (("both", *NORMS), "which norms to train with; if not given: both")},
        epochs=(EPOCHS, "passes over the texts"),
        seeds=(SEEDS, "networks of each kind"),
    )
    from tqdm import tqdm

    (texts, labels), (texts_test, labels_test) = load(np.random.default_rng(0))
    codes = vocabulary(texts)
    data = [(encode(part, codes), xp.asarray(y)) for part, y in ((texts, labels), (texts_test, labels_test))]
    x, x_test = (part for part, _ in data)
    print(f"{len(x)} texts to learn from, {len(x_test)} held out, {len(codes)} words, {xp.__name__} arrays")
    guesses = {
        "naive Bayes": naive_bayes((to_numpy(x), labels), (to_numpy(x_test), labels_test)),
        "always the most frequent": np.bincount(labels_test).max() / len(labels_test),
    }

    norms = list(NORMS) if args.norm == "both" else [args.norm]
    kinds = {NORMS[norm].__name__: (norm, P) for norm in norms}
    kinds[f"{NORMS[norms[0]].__name__} without dropout"] = (norms[0], 0)
    histories = {name: [] for name in kinds}
    network = Network(norms[0], P, len(codes) + 2, seed=0)
    same = recompute(network.block, network.embedding(x[:BATCH_SIZE]), x[:BATCH_SIZE] > 0)
    with tqdm(total=len(kinds) * args.seeds * args.epochs, unit="epoch") as progress:
        for seed in range(args.seeds):
            for name, (norm, p) in kinds.items():
                progress.set_description(f"{name}, seed {seed}")
                network = Network(norm, p, len(codes) + 2, seed)
                histories[name].append(train(network, data, args.epochs, seed, progress))
    histories = {name: np.array(found) for name, found in histories.items()}  # seeds, epochs, (loss, accuracies)

    print(f"{'accuracy, mean and standard deviation':40}{'learned from':>16}{'held out':>16}")
    for name, found in histories.items():
        mean, std = 100 * found[:, -1].mean(axis=0), 100 * found[:, -1].std(axis=0)
        print(f"  {name:38}" + "".join(f"{mean[i]:9.1f} ± {std[i]:3.1f}%" for i in (1, 2)))
    for name, level in guesses.items():
        print(f"  {name:38}{'':16}{100 * level:9.1f}%")
    draw(args.output, histories, guesses)

    if not same:
        sys.exit("expected the same gradients, to the last bit, of a block that is run again")
    least = min(guesses.values()) + GAIN
    if args.epochs >= EPOCHS and min(found[:, -1, 2].mean() for found in histories.values()) < least:
        sys.exit(f"expected held-out accuracies of {least:.0%} or more")


if __name__ == "__main__":
    layers.run(main)
