// Random numbers, and what one call is to do.
#include <cstddef>

// Counter-based random numbers: Salmon et al. (2011), Philox4x32 with ten rounds. A stream is a
// function of seed, chain and draw alone. Several places of it are filled at once, as vectors.
struct Random {
  static const int BLOCKS = 8, READY = 2 * BLOCKS, PAIRS = 16;
  uint32_t key[2], place[4];
  uint64_t bits[READY];
  int left = 0;
  const double* tape = nullptr;  // numbers to take in place of random ones

  Random(uint64_t seed, uint64_t chain, uint64_t draw) {
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    place[0] = 0, place[1] = uint32_t(chain);
    place[2] = uint32_t(draw), place[3] = uint32_t(draw >> 32);
  }
  __attribute__((noinline)) void fill() {
#pragma omp simd
    for (int i = 0; i < BLOCKS; i++) {
      uint32_t c0 = place[0] + i, c1 = place[1], c2 = place[2], c3 = place[3];
      uint32_t k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
      for (int round = 0; round < 10; round++) {
        const uint64_t first = uint64_t(0xD2511F53u) * c0, second = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(second >> 32) ^ c1 ^ k0, c1 = uint32_t(second);
        c2 = uint32_t(first >> 32) ^ c3 ^ k1, c3 = uint32_t(first);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      bits[i] = uint64_t(c1) << 32 | c0, bits[BLOCKS + i] = uint64_t(c3) << 32 | c2;
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
    const int number = READY - left--;
    return between(bits[number % 2 * BLOCKS + number / 2]);
  }
  void normals(Real* out, long n) {
    for (long i = 0; tape && i < n; i++) out[i] = Real(*tape++);
    for (long i = 0; !tape && i < n; i += 2 * PAIRS) {
      const long pairs = std::min(long(PAIRS), (n - i + 1) / 2);
      double radius[PAIRS] = {}, angle[PAIRS] = {}, along[PAIRS], across[PAIRS], made[2 * PAIRS];
      for (long k = 0; k < pairs; k++) radius[k] = uniform(), angle[k] = 2.0 * M_PI * uniform();
      const long whole = (pairs + 3) / 4 * 4;  // vectors
      for (long k = pairs; k < whole; k++) radius[k] = 1.0;
#pragma omp simd
      for (long k = 0; k < whole; k++) radius[k] = std::sqrt(-2.0 * std::log(radius[k]));
#pragma omp simd
      for (long k = 0; k < whole; k++) along[k] = std::cos(angle[k]);
#pragma omp simd
      for (long k = 0; k < whole; k++) across[k] = std::sin(angle[k]);
      for (long k = 0; k < pairs; k++)
        made[2 * k] = radius[k] * along[k], made[2 * k + 1] = radius[k] * across[k];
      for (long k = 0; k < std::min(2 * pairs, n - i); k++) out[i + k] = Real(made[k]);
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
