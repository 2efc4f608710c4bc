// Copies into shared memory that are on their way while the thread goes on.
//
// A thread reads the packs that it has copied itself, and no others: it waits for its copies, and no barrier is needed.
#pragma once
#include "pack.cuh"

// The block's dynamic shared memory.
DEVICE raw_t* staging() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<raw_t*>(memory);
}

// Starts the copy of a whole pack.
DEVICE void stage(raw_t* shared, const data_t* p) {
#if !VECTORIZED
    *shared = *p;
#elif !defined(__CUDA_ARCH__)
    __pipeline_memcpy_async(shared, p, 16);  // CUDA declares it in a header, which costs a second
#elif __CUDA_ARCH__ < 800
    *shared = load(p);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(p)
                 : "memory");
#endif
}

// Waits for the copies of this thread.
DEVICE void staged() {
#if VECTORIZED
#if !defined(__CUDA_ARCH__)
    __pipeline_commit();
    __pipeline_wait_prior(0);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
#endif
}
