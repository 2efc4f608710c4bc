// dropout: out = 0 where an element is dropped, else x * scale, each element by a word of its own
//
// Threads take packs in turns; word i is that of element i. The way back is the same, with the same draw.
// Mirror: numpy_dropout.dropout
#include "dropout.cuh"

// Each element has the word of its own number.
struct OwnWords {
    const Draw& draw;
    DEVICE void operator()(index_t at, bool (&dropped)[WIDTH]) const { draw.drops_words(at, dropped); }
    DEVICE bool single(index_t at) const { return draw.drops_word(at); }
};

extern "C" __global__ void REGISTERS(64) dropout(
    const data_t* x,                         // [size]
    Drops drops,
    // outputs
    data_t* out,                             // [size]; may be x
    // sizes
    long long size) {
    const Draw draw(drops);
    drop_all<4>(x, draw, OwnWords{draw}, out, size);
}
