// Random numbers, and what one call is to do.
#include <cstddef>

// Words of 64 bits, several together, of which the lower 32 are used. GCC takes three instructions
// for a product of such words where one does.
#if defined(__clang__) || !defined(__AVX2__)
using Words = uint64_t;
static inline Words product(Words word, uint32_t factor) { return uint64_t(uint32_t(word)) * factor; }
#elif defined(__AVX512F__)
typedef uint64_t Words __attribute__((vector_size(64)));
typedef int Halves __attribute__((vector_size(64)));
static inline Words product(Words words, uint32_t factor) {
  typedef long long Left __attribute__((vector_size(64)));
  const Words factors = Words{} + factor;
  return Words(__builtin_ia32_pmuludq512_mask(Halves(words), Halves(factors), Left{}, -1));
}
#else
typedef uint64_t Words __attribute__((vector_size(32)));
typedef int Halves __attribute__((vector_size(32)));
static inline Words product(Words words, uint32_t factor) {
  return Words(__builtin_ia32_pmuludq256(Halves(words), Halves(Words{} + factor)));
}
#endif

// Counter-based random numbers: Salmon et al. (2011), Philox4x32 with ten rounds. A stream is a
// function of seed, chain and draw alone. Several places of it are filled at once, as vectors.
struct Random {
  static const int BLOCKS = 16, READY = 2 * BLOCKS, TOGETHER = sizeof(Words) / 8;
  uint32_t key[2], place[4];
  uint64_t bits[READY];
  unsigned left = 0;
  const double* tape = nullptr;  // numbers to take in place of random ones

  Random(uint64_t seed, uint64_t chain, uint64_t draw) { begin(seed, chain, draw); }
  void begin(uint64_t seed, uint64_t chain, uint64_t draw) {
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    place[0] = 0, place[1] = uint32_t(chain);
    place[2] = uint32_t(draw), place[3] = uint32_t(draw >> 32), left = 0;
  }
  __attribute__((noinline)) void fill() {
    const uint64_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7}, lower = 0xFFFFFFFFu;
#pragma omp simd
    for (int i = 0; i < BLOCKS; i += TOGETHER) {
      Words c0, c1 = Words{} + place[1], c2 = Words{} + place[2], c3 = Words{} + place[3];
      std::memcpy(&c0, numbers, sizeof c0);
      c0 += place[0] + i;
      uint32_t k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
      for (int round = 0; round < 10; round++) {
        const Words first = product(c0, 0xD2511F53u), second = product(c2, 0xCD9E8D57u);
        c0 = second >> 32 ^ c1 ^ k0, c1 = second;
        c2 = first >> 32 ^ c3 ^ k1, c3 = first;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      const Words even = c1 << 32 | (c0 & lower), odd = c3 << 32 | (c2 & lower);
      std::memcpy(bits + i, &even, sizeof even);
      std::memcpy(bits + BLOCKS + i, &odd, sizeof odd);
    }
    place[0] += BLOCKS, left = READY;
  }
  // Between zero and one, neither included: 52 bits behind the point, and a half of the last.
  static inline double between(uint64_t bits) {
    const uint64_t one = bits >> 12 | 0x3FF0000000000000u;
    double number;
    std::memcpy(&number, &one, sizeof number);
    return number - (1.0 - 0x1.0p-53);
  }
  double uniform() {
    if (tape) return *tape++;
    if (!left) fill();
    const unsigned number = READY - left--;
    return between(bits[number % 2 * BLOCKS + number / 2]);
  }
  // Pairs of them, each from the two numbers of a block: Box and Muller (1958). They begin with
  // blocks of which nothing has been used.
  void normals(Real* out, long n) {
    for (long i = 0; tape && i < n; i++) out[i] = Real(*tape++);
    for (long i = 0; !tape && i < n; i += READY) {
      fill();
      const long count = std::min(long(READY), n - i), pairs = (count + 1) / 2;
      double radius[BLOCKS], angle[BLOCKS], made[READY];
      const long whole = (pairs + 7) / 8 * 8;  // vectors
#pragma omp simd
      for (long k = 0; k < whole; k++) radius[k] = std::sqrt(-2.0 * std::log(between(bits[k])));
#pragma omp simd
      for (long k = 0; k < whole; k++) angle[k] = 2.0 * M_PI * between(bits[BLOCKS + k]);
#pragma omp simd
      for (long k = 0; k < whole; k++) made[2 * k] = radius[k] * std::cos(angle[k]);
#pragma omp simd
      for (long k = 0; k < whole; k++) made[2 * k + 1] = radius[k] * std::sin(angle[k]);
      for (long k = 0; k < count; k++) out[i + k] = Real(made[k]);
      left = READY - 2 * pairs;
    }
  }
};

// How a chain moves: along a line of given length, a tree that turns back, or at random.
enum Motion { STRAIGHT, DOUBLING, WALK };

// What one call is to do; the package's Python has the same.
struct Call {
  long chains, draws, slots, dense, motion, threads, points;
  uint64_t seed, first_draw;
  long tape_length, refresh, stretches, factorises, blocks;
  double correlation;
  void *const *data, *const *evaluation_data;
  const Real *root, *step_sizes, *momenta, *along;
  const double *uniforms, *tape;
  const long *num_steps, *noise_blocks, *likelihood_blocks, *local_blocks;
  Real *position, *noise, *value, *gradient, *likelihoods, *local;
  Real *positions, *values, *locals;
  double *rate, *error, *energy, *estimate, *share;
  long *n_steps, *n_densities;
  bool *diverging, *limited, *accepted;
};
