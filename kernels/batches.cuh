// Batches: the packs of a thread, several at a time, out of memory or from the block's shared memory.
//
// `Packs`, a template parameter, are the packs of a thread: they have a count, and next() gives the place of the next
// one, that of its first element in the array.
#pragma once
#include "staging.cuh"
#include "team.cuh"

// Calls body(full, i, count) for a thread's packs in batches: for `count` of them from number i on. All batches have
// AT_ONCE packs but perhaps the last one; `full`, which the compiler knows, is whether this one has.
template <int AT_ONCE, class Body>
DEVICE void in_batches(int packs, Body body) {
    int i = 0;
#pragma unroll 1
    for (; i + AT_ONCE <= packs; i += AT_ONCE) body(Yes(), i, AT_ONCE);
    if (AT_ONCE > 1 && i < packs) body(No(), i, packs - i);
}

// Calls body(u) for each pack u of such a batch, in a loop that is unrolled: arrays of AT_ONCE values stay in
// registers.
template <int AT_ONCE, class Full, class Body>
DEVICE void each(Full full, int count, Body body) {
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        if (!full && u == count) break;
        body(u);
    }
}

// Sources tell where a thread reads its packs. get(at, i) is pack i of the thread, whose first element is array[at], and
// element(at, i, e) its element e; put(raw, i) and put_element(value, i, e) change it, where that can be; FAR is whether
// packs take long to come.

// The source of streamed kernels: memory.
struct InMemory {
    static constexpr bool FAR = true;
    const data_t* array;
    DEVICE raw_t get(index_t at, int) const { return load(array + at); }
    DEVICE data_t element(index_t at, int, int e) const { return array[at + e]; }
    DEVICE void put_element(const data_t&, int, int) const {}
    DEVICE void put(const raw_t&, int) const {}  // memory stays as it is
};

// The source of kernels on chip: shared memory, where the packs of a thread lie TEAM apart, as each thread of a team
// has one in turn. They come in GROUPS groups of `group` packs.
struct OnChip {
    static constexpr bool FAR = false;
    raw_t* own;  // the first one of the thread
    int group;
    DEVICE raw_t get(index_t, int i) const { return own[i * TEAM]; }
    DEVICE data_t element(index_t, int i, int e) const { return elements(i)[e]; }
    DEVICE void put_element(const data_t& value, int i, int e) const { elements(i)[e] = value; }
    DEVICE data_t* elements(int i) const { return reinterpret_cast<data_t*>(own + i * TEAM); }
    DEVICE void put(const raw_t& raw, int i) const { own[i * TEAM] = raw; }
};

// Calls body as in_batches does, for each batch once its packs have come in.
template <int AT_ONCE, class Body>
DEVICE void as_they_come(const InMemory&, int count, Body body) {
    in_batches<AT_ONCE>(count, body);
}
template <int AT_ONCE, class Body>
DEVICE void as_they_come(const OnChip& source, int count, Body body) {
    int i = 0, groups = 0, there = 0;  // groups that have been waited for, and how many packs they have
#pragma unroll 1
    for (; i + AT_ONCE <= count; i += AT_ONCE) {
        if (i == there) {
            wait_for(++groups);
            there += source.group;
        }
        body(Yes(), i, AT_ONCE);
    }
    if (AT_ONCE == 1 || i == count) return;
    wait_but<0>();
    body(No(), i, count - i);
}

// Packs of a group, where a thread copies so many packs to shared memory in batches of AT_ONCE.
template <int AT_ONCE>
DEVICE int group_of_copies(int packs) {
    return (packs + GROUPS * AT_ONCE - 1) / (GROUPS * AT_ONCE) * AT_ONCE;
}

// Starts the copies of a thread's packs of K arrays to shared memory, to `kept` and what follows TEAM apart, in GROUPS
// groups of whole batches of AT_ONCE. Returns how many packs a group has.
template <int AT_ONCE, int K, class Packs>
DEVICE int stage(raw_t* const (&kept)[K], const data_t* const (&arrays)[K], Packs packs) {
    const int group = group_of_copies<AT_ONCE>(packs.count);
    if constexpr (CARRIED) {
        constexpr int IN_FLIGHT = 8 / K;
        in_batches<IN_FLIGHT>(packs.count, [&](auto full, int i, int count) {
            raw_t raw[K][IN_FLIGHT];
            each<IN_FLIGHT>(full, count, [&](int u) {
                const index_t at = packs.next();
#pragma unroll
                for (int k = 0; k < K; k++) raw[k][u] = load(arrays[k] + at);
            });
            each<IN_FLIGHT>(full, count, [&](int u) {
#pragma unroll
                for (int k = 0; k < K; k++) kept[k][(i + u) * TEAM] = raw[k][u];
            });
        });
    } else {
        unsigned addresses[K];
#pragma unroll
        for (int k = 0; k < K; k++) addresses[k] = address_of(kept[k]);
        int i = 0;
#pragma unroll 1
        for (int g = 1; g <= GROUPS; g++) {
#pragma unroll 1
            for (; i < min(g * group, packs.count); i++) {
                const index_t at = packs.next();
#pragma unroll
                for (int k = 0; k < K; k++) copy(kept[k], addresses[k], i * TEAM, arrays[k] + at);
            }
            end_group();
        }
    }
    return group;
}
