// Dropout of the packs of an array, whatever tells which of their elements are dropped.
#pragma once
#include "bundles.cuh"
#include "philox.cuh"

// What a thread knows of a draw.
struct Draw {
    Philox philox;
    unsigned threshold;
    bool all;  // whether the threshold is 2^32, which no word reaches
    acc_t scale;

    DEVICE explicit Draw(const Drops& drops)
        : philox(drops.drawn), threshold((unsigned)drops.threshold), all(drops.threshold >> 32), scale(drops.scale) {}

    DEVICE bool drops(unsigned word) const { return all || word < threshold; }
    DEVICE bool drops_word(unsigned long long i) const { return drops(philox(i / 4).word((unsigned)i)); }
    // Whether each of WIDTH words is dropped, from word i on, which is a multiple of WIDTH.
    DEVICE void drops_words(unsigned long long i, bool (&dropped)[WIDTH]) const {
#pragma unroll
        for (int e = 0; e < WIDTH; e += 4) {
            const Block block = philox((i + e) / 4);
#pragma unroll
            for (int k = 0; k < 4 && e + k < WIDTH; k++)
                dropped[e + k] = drops(WIDTH < 4 ? block.word((unsigned)i + k) : block.word(k));
        }
    }
    // What becomes of an element. One that is dropped is +0, whatever it was.
    DEVICE acc_t apply(bool dropped, acc_t x) const { return dropped ? 0 : x * scale; }
};

// Writes what becomes of all elements of an array. Threads take packs in turns, and single elements where there are too
// few for one more pack; AT_ONCE packs of a thread are in flight at once. `fate(at, dropped)` tells which elements are dropped of the pack whose first one is x[at],
// fate.single(at) whether x[at] is.
template <int AT_ONCE, class Fate>
DEVICE void drop_all(const data_t* x, const Draw& draw, const Fate& fate, data_t* out, long long size) {
    const index_t packs = (index_t)(size / WIDTH), threads = (index_t)gridDim.x * THREADS;
    const index_t first = (index_t)blockIdx.x * THREADS + threadIdx.x;
    for (index_t pack = first; pack < packs; pack += AT_ONCE * threads) {
        raw_t raw[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            if (pack + u * threads < packs) raw[u] = load(x + (pack + u * threads) * WIDTH);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (pack + u * threads >= packs) break;
            const index_t at = (pack + u * threads) * WIDTH;
            bool dropped[WIDTH];
            fate(at, dropped);
            acc_t values[WIDTH];
            unpack(raw[u], values);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) values[e] = draw.apply(dropped[e], values[e]);
            store(out + at, ::pack(values));
        }
    }
    const index_t at = packs * WIDTH + first;
    if (WIDTH > 1 && at < size) narrow(draw.apply(fate.single(at), widen(x[at])), out[at]);
}
