// Moments: count, mean and sum of squared deviations of some values; how they come about, and how they merge.
#pragma once
#include "bundles.cuh"

// The moments of one channel, or of a part of it.
struct ChannelMoments {
    double count, mean, m2;

    DEVICE double var() const { return m2 / count; }
};

// The moments of two sets of values together; share = b.count / (a.count + b.count). Chan, Golub and LeVeque (1979).
DEVICE ChannelMoments merge(const ChannelMoments& a, const ChannelMoments& b, double share) {
    const double delta = b.mean - a.mean;
    return {a.count + b.count, a.mean + delta * share, a.m2 + b.m2 + delta * (delta * (a.count * share))};
}
DEVICE ChannelMoments merge(const ChannelMoments& a, const ChannelMoments& b) {
    const double count = a.count + b.count;
    return count == 0 ? a : merge(a, b, b.count / count);
}

// Writes what `own` has found of channel c, one of C, as a part of the moments. The thread of channel 0 writes the
// count, and that of part 0 copies the counter of batches as it is before another launch moves it.
DEVICE void set_moments(const Moments& moments, long long part, long long C, long long c, const ChannelMoments& own,
                        const long long* batches) {
    moments.mean[part * C + c] = own.mean;
    moments.m2[part * C + c] = own.m2;
    if (c == 0) {
        moments.count[part] = own.count;
        if (part == 0 && moments.batches) *moments.batches = *batches;
    }
}

// The sum of N values, added pair by pair: each takes part in few roundings.
template <int N, class A>
DEVICE A sum_pairs(const A (&values)[N]) {
    static_assert((N & (N - 1)) == 0, "a power of two");
    A sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = values[i];
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// Whether the dtype A held the squares of deviations. 0 may be the sum of squares that it lost.
template <class A>
DEVICE bool held_squares(A m2) {
    return sizeof(A) == 8 || (1e-28f < m2 && m2 < 1e36f);
}

// A few values, summed in the dtype A: their mean, which is base + offset, and the sum of squares of deviations from
// it. That the mean is rounded does no harm to these: about a center that is off by d, the squares of n values are
// n * d * d too many.
template <class A>
struct Chunk {
    A base, sum, offset, m2;  // sum is that of deviations from base
    bool held;                // whether the dtype A held the squares
};

// The values of a chunk that there are: the first `count`, all of them if full, which the compiler knows.
template <class Full>
struct FirstOnes {
    static constexpr bool GAPS = false;
    Full full;
    int count;
    DEVICE bool operator()(int i) const { return full || i < count; }
};
// The values of a chunk that a mask leaves: those whose bit is set.
struct Chosen {
    static constexpr bool GAPS = true;
    No full;
    int count;
    unsigned bits;
    DEVICE explicit Chosen(unsigned bits) : full(), count(__popc(bits)), bits(bits) {}
    DEVICE bool operator()(int i) const { return bits >> i & 1; }
};

// Whether elements are added without a base: float32 holds the sum of some dozens of 16-bit elements exactly.
constexpr bool ADDED_AS_THEY_ARE = sizeof(data_t) == 2;

// The chunk of those of N values that there are, at least one; get(i) is value i. Several sums go on side by side, so
// that each has few roundings.
template <class A, int N, class There, class Get>
DEVICE Chunk<A> chunk_of(const There& there, Get get) {
    constexpr int SUMS = N < 4 ? N : 4;
    A first = (A)get(0);
    if (There::GAPS)
#pragma unroll
        for (int i = N - 1; i >= 0; i--)
            if (there(i)) first = (A)get(i);
    Chunk<A> chunk;
    chunk.base = ADDED_AS_THEY_ARE && sizeof(A) < 8 ? 0 : first;
    A d[N], sums[SUMS];
#pragma unroll
    for (int i = 0; i < N; i++) {
        d[i] = (A)get(i) - chunk.base;
        if (i < SUMS) sums[i] = there(i) ? d[i] : 0;
        else if (there(i)) sums[i % SUMS] += d[i];
    }
    chunk.sum = sum_pairs(sums);
    chunk.offset = there.full ? chunk.sum * ((A)1 / N) : chunk.sum / (A)there.count;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const A deviation = d[i] - chunk.offset;
        if (i < SUMS) sums[i] = there(i) ? deviation * deviation : 0;
        else if (there(i)) sums[i % SUMS] += deviation * deviation;
    }
    chunk.m2 = sum_pairs(sums);
    // The squares of float16 are never too large nor too small. For others 0 is right where all values are the same,
    // and only there.
    chunk.held = (sizeof(A) == 4 && IS_FLOAT16) || held_squares<A>(chunk.m2);
    if (!chunk.held && chunk.m2 == 0) {
        const A away = There::GAPS ? first - chunk.base : d[0];
        chunk.held = true;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (there(i)) chunk.held = chunk.held && d[i] == away;
    }
    return chunk;
}

// The moments of many values, to which chunks are added one by one in float64; the pivot is an element of the channel.
// T is the dtype of the arithmetic. Chunks of float64 data are merged by Chan's formula, which takes a division for
// each.
template <class T>
struct Total {
    double pivot;
    ChannelMoments own;

    DEVICE Total() {}
    DEVICE explicit Total(double pivot) : pivot(pivot), own{0, 0, 0} {}
    template <class A, class Full>
    DEVICE void add(Full, double count, const Chunk<A>& chunk) {
        own = merge(own, {count, (double)chunk.base + (double)chunk.offset, (double)chunk.m2});
    }
    DEVICE ChannelMoments moments(double) const { return own; }
};

// Total of other data: sums of deviations from the pivot will do, and those of several threads can simply be added.
// Where the pivot is the outlier that makes up all of the variance, n values lose a factor of n of float64's accuracy.
template <>
struct Total<float> {
    double pivot, sum, squares;

    DEVICE Total() {}
    DEVICE explicit Total(double pivot) : pivot(pivot), sum(0), squares(0) {}
    // Adds `count` values. Where that is no power of two, the chunk's mean has one rounding more than their sum.
    template <class A, class Full>
    DEVICE void add(Full full, double count, const Chunk<A>& chunk) {
        const double away =
            ADDED_AS_THEY_ARE && sizeof(A) < 8 ? chunk.offset - pivot : (chunk.base - pivot) + chunk.offset;
        const double part = full ? count * away : count * (chunk.base - pivot) + chunk.sum;
        sum += part;
        // The mean about which m2 is taken is rounded: deviations from it add up to part - count * away, not to 0.
        squares += (full ? part : part + (part - count * away)) * away + chunk.m2;
    }
    // The moments of all that were added, `count` values.
    DEVICE ChannelMoments moments(double count) const {
        const double off = sum / count, m2 = squares - sum * off;
        return {count, pivot + off, m2 < 0 ? 0 : m2};  // NaN stays
    }
};

// Power of two that sums of dy * xhat are multiplied by in float32: it loses fewer of the small products then, and
// where it does not hold large ones, float64 takes over.
constexpr float PRODUCT_SCALE = 0x1p32f;
DEVICE double unscaled(double sum) { return sum * 0x1p-32; }

// Whether its dtype has held a sum, which is too large for it else.
DEVICE bool held(float sum) { return -1e36f < sum && sum < 1e36f; }
DEVICE bool held(double) { return true; }
