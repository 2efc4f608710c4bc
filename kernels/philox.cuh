// Philox4x32-10: four random words from a counter of 128 bits and a key of 64, as Random123 defines them.
//
// Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). Nothing is remembered from one
// block of words to the next: any thread works out any of them.
// Mirror: numpy_dropout._philox
#pragma once
#include "types.cuh"

// Four words of random bits.
struct Block {
    unsigned a, b, c, d;

    // Word i of the four, in which only the last two bits of i count.
    DEVICE unsigned word(unsigned i) const { return i & 2 ? (i & 1 ? d : c) : (i & 1 ? b : a); }
};

// The product of two words, by the one instruction for it: from C++ the compiler makes another one as well, which adds
// 0 to the upper half.
DEVICE unsigned long long product(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
    unsigned long long result;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
    return result;
#else
    return (unsigned long long)a * b;
#endif
}

// The words of one call of one generator. The key is the seed; the call is the upper half of the counter, and the lower
// half counts blocks.
class Philox {
    unsigned key[2], call[2];

  public:
    // drawn is [2]: the seed and the number of the call.
    DEVICE explicit Philox(const unsigned long long* drawn) : Philox(drawn[0], drawn[1]) {}
    DEVICE Philox(unsigned long long seed, unsigned long long number)
        : key{(unsigned)seed, (unsigned)(seed >> 32)}, call{(unsigned)number, (unsigned)(number >> 32)} {}

    // The words 4 * block to 4 * block + 3.
    DEVICE Block operator()(unsigned long long block) const {
        unsigned a = (unsigned)block, b = (unsigned)(block >> 32), c = call[0], d = call[1];
#pragma unroll
        for (unsigned round = 0; round < 10; round++) {
            const unsigned long long first = product(0xD2511F53u, a), second = product(0xCD9E8D57u, c);
            a = (unsigned)(second >> 32) ^ b ^ (key[0] + round * 0x9E3779B9u);
            b = (unsigned)second;
            c = (unsigned)(first >> 32) ^ d ^ (key[1] + round * 0xBB67AE85u);
            d = (unsigned)first;
        }
        return {a, b, c, d};
    }
};
