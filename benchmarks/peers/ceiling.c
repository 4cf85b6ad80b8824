// What this machine can do at most: reading DRAM and multiplying, all given cores at once.
//
//   cc -O3 -march=native -pthread ceiling.c -o ceiling && ./ceiling 0 1
//
// Prints one JSON object. Each thread is pinned to one of the cores named as arguments; a figure is
// the best of several repeats, since a ceiling is what was reached once. The products run from
// registers: no memory is read. Instruction sets that the compiler's target lacks are left out.

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Short repeats, and many: some fall between what else the machine does.
enum { MAX_THREADS = 256, REPEATS = 40, STREAMS = 4, ITERATIONS = 2000000 };
static const size_t READ_BYTES = (size_t)2 << 30;  // of all threads together

typedef struct {
  int core;
  size_t num_bytes;
  uint64_t *data;
  uint64_t sink;
} Thread;

typedef void (*Kernel)(Thread *);

static Thread threads[MAX_THREADS];
static int num_threads;
static pthread_barrier_t barrier;
static Kernel kernel;

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void read_memory(Thread *thread) {
  // Several streams a thread: one stream leaves the memory waiting for its prefetcher.
  typedef uint64_t Vector __attribute__((vector_size(64)));
  const size_t count = thread->num_bytes / sizeof(Vector) / STREAMS;
  const Vector *data = (const Vector *)thread->data;
  Vector sums[STREAMS] = {{0}};
  for (size_t i = 0; i < count; i++)
    for (int stream = 0; stream < STREAMS; stream++) sums[stream] ^= data[stream * count + i];
  for (int stream = 0; stream < STREAMS; stream++)
    for (int lane = 0; lane < 8; lane++) thread->sink ^= sums[stream][lane];
}

// Twelve independent sums hide the latency of an instruction, and fit beside its operands.
#define SUMS 12
#define KEEP(sums) \
  for (int i = 0; i < SUMS; i++) __asm__ volatile("" : "+v"(sums[i]))

#if defined(__AVX512F__)
static void fp32_products(Thread *thread) {
  __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(1e-9f), sums[SUMS];
  for (int i = 0; i < SUMS; i++) sums[i] = _mm512_setzero_ps();
  __asm__ volatile("" : "+v"(a), "+v"(b));
  for (int n = 0; n < ITERATIONS; n++) {
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
    KEEP(sums);
  }
  thread->sink += (uint64_t)_mm512_reduce_add_ps(sums[0]);
}
#elif defined(__FMA__)
static void fp32_products(Thread *thread) {
  __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(1e-9f), sums[SUMS];
  for (int i = 0; i < SUMS; i++) sums[i] = _mm256_setzero_ps();
  __asm__ volatile("" : "+x"(a), "+x"(b));
  for (int n = 0; n < ITERATIONS; n++) {
    for (int i = 0; i < SUMS; i++) sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
    for (int i = 0; i < SUMS; i++) __asm__ volatile("" : "+x"(sums[i]));
  }
  thread->sink += (uint64_t)_mm256_cvtss_f32(sums[0]);
}
#endif

#if defined(__AVX512BF16__)
static void bf16_products(Thread *thread) {
  __m512 sums[SUMS];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;  // ones
  for (int i = 0; i < SUMS; i++) sums[i] = _mm512_setzero_ps();
  __asm__ volatile("" : "+v"(a), "+v"(b));
  for (int n = 0; n < ITERATIONS; n++) {
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    KEEP(sums);
  }
  thread->sink += (uint64_t)_mm512_reduce_add_ps(sums[0]);
}
#endif

#if defined(__AVX512VNNI__)
static void int8_products(Thread *thread) {
  __m512i a = _mm512_set1_epi8(1), b = a, sums[SUMS];
  for (int i = 0; i < SUMS; i++) sums[i] = _mm512_setzero_si512();
  __asm__ volatile("" : "+v"(a), "+v"(b));
  for (int n = 0; n < ITERATIONS; n++) {
    for (int i = 0; i < SUMS; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    KEEP(sums);
  }
  thread->sink += (uint64_t)_mm512_reduce_add_epi32(sums[0]);
}
#endif

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX 1
static int ask_for_amx(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static void configure_tiles(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config __attribute__((aligned(64)));
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
  // GCC 12 believes that _tile_loadconfig reads 8 bytes and drops the stores to the others.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

static void amx_bf16_products(Thread *thread) {
  (void)thread;
  configure_tiles();
  for (int n = 0; n < ITERATIONS / 16; n++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

static void amx_int8_products(Thread *thread) {
  (void)thread;
  configure_tiles();
  for (int n = 0; n < ITERATIONS / 16; n++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#endif

static void *run(void *argument) {
  Thread *thread = argument;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(thread->core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  if (thread->data == NULL) {  // first touch, on the thread's own core
    thread->data = mmap(NULL, thread->num_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (thread->data == MAP_FAILED) exit(1);
    madvise(thread->data, thread->num_bytes, MADV_HUGEPAGE);
    memset(thread->data, 1, thread->num_bytes);
  }
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    pthread_barrier_wait(&barrier);
    kernel(thread);
    pthread_barrier_wait(&barrier);
  }
  return NULL;
}

// Seconds of the fastest repeat, all threads together.
static double best_s(Kernel what) {
  pthread_t ids[MAX_THREADS];
  double best = 1e30;
  kernel = what;
  for (int i = 0; i < num_threads; i++) pthread_create(&ids[i], NULL, run, &threads[i]);
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    pthread_barrier_wait(&barrier);
    const double started = now_s();
    pthread_barrier_wait(&barrier);
    const double seconds = now_s() - started;
    if (seconds < best) best = seconds;
  }
  for (int i = 0; i < num_threads; i++) pthread_join(ids[i], NULL);
  return best;
}

// A rate in 1e9 a second, of `operations` of each thread.
static void report(const char *name, Kernel what, double operations) {
  printf(", \"%s\": %.4g", name, 1e-9 * num_threads * operations / best_s(what));
}

int main(int argc, char **argv) {
  num_threads = argc - 1;
  if (num_threads < 1 || num_threads > MAX_THREADS) return 2;
  for (int i = 0; i < num_threads; i++) {
    threads[i].core = atoi(argv[i + 1]);
    threads[i].num_bytes = READ_BYTES / (size_t)num_threads & ~(size_t)4095;
  }
  pthread_barrier_init(&barrier, NULL, (unsigned)num_threads + 1);
#if HAS_AMX
  const int has_amx = ask_for_amx();  // before the threads are made, which inherit it
#endif
  printf("{\"num_threads\": %d", num_threads);
  report("read_gb_s", read_memory, (double)threads[0].num_bytes);
#if defined(__AVX512F__)
  report("fp32_gflops", fp32_products, 2.0 * 16 * SUMS * ITERATIONS);
#elif defined(__FMA__)
  report("fp32_gflops", fp32_products, 2.0 * 8 * SUMS * ITERATIONS);
#endif
#if defined(__AVX512BF16__)
  report("bf16_avx512_gflops", bf16_products, 2.0 * 32 * SUMS * ITERATIONS);
#endif
#if defined(__AVX512VNNI__)
  report("int8_avx512_gops", int8_products, 2.0 * 64 * SUMS * ITERATIONS);
#endif
#if HAS_AMX
  if (has_amx) {
    report("bf16_amx_gflops", amx_bf16_products, 4.0 * 2 * 16 * 16 * 32 * (ITERATIONS / 16));
    report("int8_amx_gops", amx_int8_products, 4.0 * 2 * 16 * 16 * 64 * (ITERATIONS / 16));
  }
#endif
  puts("}");
  return 0;
}
