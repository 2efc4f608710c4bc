// dropout_draw: a copy of the seed and the number of calls so far, which then goes up by one
//
// One thread does it: whatever the call launches then, and whatever its way back launches later, reads the copy.
// Mirror: numpy_dropout.dropout_draw
#include "types.cuh"

extern "C" __global__ void REGISTERS(32) dropout_draw(
    unsigned long long* state,               // [2]: the seed and the number of calls
    // outputs
    unsigned long long* drawn) {             // [2]
    if (threadIdx.x > 0) return;
    const unsigned long long calls = state[1];
    drawn[0] = state[0];
    drawn[1] = calls;
    state[1] = calls + 1;
}
