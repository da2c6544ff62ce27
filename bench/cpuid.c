/* Hide instructions that are wider than AVX2 from a process and its children: a library to preload.

Libraries choose their code by CPUID. Linux lets the instruction fault (arch_prctl, ARCH_SET_CPUID; the flag cpuid_fault
in /proc/cpuinfo). The handler below answers in place of the processor, without the bits of AVX-512 and AMX (Intel 64 and
IA-32 Architectures Software Developer's Manual, volume 2, CPUID). */

#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_GET_CPUID 0x1011
#define ARCH_SET_CPUID 0x1012
#define BIT(number) (UINT32_C(1) << (number))

static struct sigaction before;

static long set_cpuid(int allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void answer(int number, siginfo_t *information, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
  if (information->si_code != SI_KERNEL || instruction[0] != 0x0f || instruction[1] != 0xa2) {
    /* another fault: it comes again, to the handler that was there */
    sigaction(SIGSEGV, &before, NULL);
    return;
  }
  uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
  set_cpuid(1);
  __cpuid_count(leaf, part, a, b, c, d);
  set_cpuid(0);
  if (leaf == 7 && part == 0) {
    /* AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS, VP2INTERSECT,
       AMX-BF16, FP16, AMX-TILE, AMX-INT8 */
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
  }
  if (leaf == 7 && part == 1) {
    /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA; the rest are newer still */
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
    d = 0;
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

/* Return 1 if CPUID faults in this thread. */
int hides(void) { return syscall(SYS_arch_prctl, ARCH_GET_CPUID, 0) == 0; }

__attribute__((constructor)) static void hide(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  if (sigaction(SIGSEGV, &action, &before) == 0 && set_cpuid(0) != 0) {
    sigaction(SIGSEGV, &before, NULL);
  }
}
