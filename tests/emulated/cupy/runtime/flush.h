// Subnormal float32 operands and results are zeros, as with -ftz=true; those of float64 are what they are.
//
// A CPU flushes both types or neither (bits FTZ and DAZ of its register MXCSR). So kernels run without flushing, and
// subnormal operands and results raise exceptions: an instruction that meets one is stopped before it has done
// anything. It is then repeated, alone, in the mode that its type asks for. Instructions without subnormals lose no
// time.
#pragma once
#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>
#include <xmmintrin.h>

namespace {

constexpr unsigned FLUSH = 0x8040, EXCEPTIONS = 0x1f80, SUBNORMALS = 0x0900, FLAGS = 0x003f;  // bits of MXCSR
constexpr greg_t SINGLE_STEP = 0x100;                                                          // a bit of EFLAGS

// Whether an instruction of SSE or AVX computes with float32, as its prefix tells. Only conversions between float32 and
// float64 have both types, and count as float32.
bool is_float32(const unsigned char* at) {
    enum { NONE, P66, PF3, PF2 } prefix = NONE;
    for (;; at++) {
        if (*at == 0x66 && prefix == NONE) prefix = P66;
        else if (*at == 0xf3) prefix = PF3;
        else if (*at == 0xf2) prefix = PF2;
        else if (*at != 0x66 && *at != 0x67 && *at != 0x64 && *at != 0x65) break;
    }
    unsigned map = 1;
    bool wide = false;
    if (*at == 0xc5) {  // VEX of two bytes
        prefix = decltype(prefix)(at[1] & 3);
        at += 2;
    } else if (*at == 0xc4 || *at == 0x62) {  // VEX of three bytes, EVEX
        map = at[1] & (*at == 0xc4 ? 31 : 7);
        wide = at[2] >> 7;
        prefix = decltype(prefix)(at[2] & 3);
        at += *at == 0xc4 ? 3 : 4;
    } else {
        if ((*at & 0xf0) == 0x40) at++;  // REX
        at++;                            // 0F
    }
    if (map != 1) return !wide;
    return *at == 0x5a || prefix == NONE || prefix == PF3;
}

struct sigaction before_fault, before_step;

void do_it_alone(int, siginfo_t* info, void* context) {
    mcontext_t& of = ((ucontext_t*)context)->uc_mcontext;
    if (info->si_code != FPE_FLTUND && info->si_code != FPE_FLTRES && info->si_code != FPE_FLTINV) {
        sigaction(SIGFPE, &before_fault, nullptr);  // another fault, which the former handler gets
        return;
    }
    const bool flush = is_float32((const unsigned char*)of.gregs[REG_RIP]);
    unsigned& mode = of.fpregs->mxcsr;
    mode = (mode & ~(FLAGS | FLUSH)) | EXCEPTIONS | (flush ? FLUSH : 0);
    of.gregs[REG_EFL] |= SINGLE_STEP;
}

void go_on(int, siginfo_t*, void* context) {
    mcontext_t& of = ((ucontext_t*)context)->uc_mcontext;
    of.fpregs->mxcsr &= ~(FLAGS | FLUSH | SUBNORMALS);
    of.gregs[REG_EFL] &= ~SINGLE_STEP;
}

// A guard: while it exists, this thread flushes subnormal numbers as a GPU does.
class Flush {
   public:
    Flush() : mode(_mm_getcsr()) {
        struct sigaction fault = {}, step = {};
        fault.sa_sigaction = do_it_alone, step.sa_sigaction = go_on;
        fault.sa_flags = step.sa_flags = SA_SIGINFO;
        sigaction(SIGFPE, &fault, &before_fault);
        sigaction(SIGTRAP, &step, &before_step);
        _mm_setcsr((mode | EXCEPTIONS) & ~(FLAGS | FLUSH | SUBNORMALS));
    }
    ~Flush() {
        _mm_setcsr(mode);
        sigaction(SIGFPE, &before_fault, nullptr);
        sigaction(SIGTRAP, &before_step, nullptr);
    }

   private:
    const unsigned mode;
};

}  // namespace
#elif defined(__SSE__)
#include <xmmintrin.h>

namespace {

// On other systems float64 is flushed as well.
class Flush {
   public:
    Flush() : mode(_mm_getcsr()) { _mm_setcsr(mode | 0x8040); }
    ~Flush() { _mm_setcsr(mode); }

   private:
    const unsigned mode;
};

}  // namespace
#else
namespace {
struct Flush {};  // on other processors nothing is flushed
}  // namespace
#endif
