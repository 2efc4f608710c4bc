// Copies into shared memory that are on their way while the thread goes on.
//
// A thread reads the packs that it has copied itself, and no others: it waits for its copies, and no barrier is needed.
#pragma once
#include "pack.cuh"

constexpr int GROUPS = 4;  // of a thread's copies: it works on the first ones while the others are on their way

// The block's dynamic shared memory.
DEVICE raw_t* staging() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<raw_t*>(memory);
}

// A place in shared memory as copies want it: worked out once, outside loops.
DEVICE unsigned address_of(const raw_t* shared) {
#ifdef __CUDA_ARCH__
    unsigned address;  // opaque: the compiler would work it out again for each copy
    asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"((unsigned)__cvta_generic_to_shared(shared)));
    return address;
#else
    return 0;
#endif
}

// Whether the thread itself has to carry packs: where GPUs know no such copies, and of fewer bytes than these move.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool CARRIED = true;
#else
constexpr bool CARRIED = PACK_BYTES < 4;
#endif

// Starts the copy of the pack at p to pack i after `shared`, whose address is given as well.
DEVICE void copy(raw_t* shared, unsigned address, int i, const data_t* p) {
#ifndef __CUDA_ARCH__
    __pipeline_memcpy_async(shared + i, p, PACK_BYTES);  // CUDA declares it in a header, which costs a second
#elif __CUDA_ARCH__ >= 800
    const unsigned to = address + i * PACK_BYTES;
    if (PACK_BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(p), "n"(PACK_BYTES % 16 ? PACK_BYTES : 4)
                     : "memory");
#endif
}

// Ends a group of this thread's copies.
DEVICE void end_group() {
#if !defined(__CUDA_ARCH__)
    __pipeline_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups of this thread but the last LEFT.
template <int LEFT>
DEVICE void wait_but() {
#if !defined(__CUDA_ARCH__)
    __pipeline_wait_prior(LEFT);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Waits for the first `groups` of GROUPS.
DEVICE void wait_for(int groups) {
    static_assert(GROUPS == 4, "a case for each");
    if (groups >= 4)
        wait_but<0>();
    else if (groups >= 3)
        wait_but<1>();
    else if (groups >= 2)
        wait_but<2>();
    else
        wait_but<3>();
}
