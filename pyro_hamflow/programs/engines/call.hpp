// Random numbers, and what one call is to do.
#include <cstddef>

// Counter-based random numbers: Salmon et al. (2011), Philox4x32 with ten rounds. A stream is a
// function of seed, chain and draw alone.
struct Random {
  uint32_t key[2], place[4];
  uint64_t ready[2];
  int left = 0;
  const double* tape = nullptr;  // numbers to take in place of random ones

  Random(uint64_t seed, uint64_t chain, uint64_t draw) {
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    place[0] = 0, place[1] = uint32_t(chain);
    place[2] = uint32_t(draw), place[3] = uint32_t(draw >> 32);
  }
  void fill() {
    uint32_t c[4] = {place[0]++, place[1], place[2], place[3]}, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
      const uint64_t first = uint64_t(0xD2511F53u) * c[0], second = uint64_t(0xCD9E8D57u) * c[2];
      const uint32_t c1 = c[1], c3 = c[3];
      c[0] = uint32_t(second >> 32) ^ c1 ^ k0, c[1] = uint32_t(second);
      c[2] = uint32_t(first >> 32) ^ c3 ^ k1, c[3] = uint32_t(first);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    ready[0] = uint64_t(c[1]) << 32 | c[0], ready[1] = uint64_t(c[3]) << 32 | c[2];
    left = 2;
  }
  double uniform() {  // between zero and one, neither included
    if (tape) return *tape++;
    if (!left) fill();
    return (double(ready[2 - left--] >> 12) + 0.5) * 0x1.0p-52;
  }
  void normals(Real* out, long n) {
    for (long i = 0; tape && i < n; i++) out[i] = Real(*tape++);
    for (long i = 0; !tape && i < n; i += 2) {
      const double radius = std::sqrt(-2.0 * std::log(uniform())), angle = 2.0 * M_PI * uniform();
      out[i] = Real(radius * std::cos(angle));
      if (i + 1 < n) out[i + 1] = Real(radius * std::sin(angle));
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
