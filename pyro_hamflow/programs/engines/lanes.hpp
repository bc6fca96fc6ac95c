// Numbers of a chain as vectors of the processor. Behind them there are zeros, up to a whole vector:
// loops have neither a rest nor reads across what was written apart, which wait for the memory.
template <class T, long COUNT>
struct Vector {
  typedef T Type __attribute__((vector_size(COUNT * sizeof(T)), aligned(sizeof(T)), may_alias));
};
static const long LANES = 32 / sizeof(Real);
using Lanes = Vector<Real, LANES>::Type;
using Doubles = Vector<double, LANES>::Type;

static const long FEW = 64;  // numbers that are copied one vector after the other

static constexpr long whole(long count) { return (count + LANES - 1) / LANES * LANES; }
static inline Lanes& lanes(Real* at) { return *reinterpret_cast<Lanes*>(at); }
static inline const Lanes& lanes(const Real* at) { return *reinterpret_cast<const Lanes*>(at); }

// A sum and a product, in one instruction where the processor has one.
template <class V>
static inline __attribute__((always_inline)) V plus_product(V sum, V one, V other) {
#ifdef FP_FAST_FMA
  const long count = sizeof(V) / sizeof(sum[0]);
  std::decay_t<decltype(sum[0])> added[count], left[count], right[count];
  std::memcpy(added, &sum, sizeof sum), std::memcpy(left, &one, sizeof one);
  std::memcpy(right, &other, sizeof other);
#pragma omp simd
  for (long k = 0; k < count; k++) added[k] = std::fma(left[k], right[k], added[k]);
  std::memcpy(&sum, added, sizeof sum);
  return sum;
#else
  return sum + one * other;
#endif
}
// The sum of a vector: halves are added until one number is left.
template <long COUNT, class T>
static inline __attribute__((always_inline)) auto total(T vector) {
  if constexpr (COUNT == 2) return vector[0] + vector[1];
  else {
    using Half = typename Vector<std::decay_t<decltype(vector[0])>, COUNT / 2>::Type;
    Half low, high;
    std::memcpy(&low, &vector, sizeof low);
    std::memcpy(&high, reinterpret_cast<char*>(&vector) + sizeof low, sizeof high);
    return total<COUNT / 2>(Half(low + high));
  }
}

// Adds numbers times a factor. What is read and what is written lie apart.
static inline __attribute__((always_inline)) void add_times(
    Real* __restrict to, Real factor, const Real* __restrict from, long count) {
  long i = 0;
  for (; i + LANES <= count; i += LANES) lanes(to + i) += factor * lanes(from + i);
  for (; i < count; i++) to[i] += factor * from[i];
}

static inline __attribute__((always_inline)) double half_squares(const Real* r, long count) {
  Doubles sums = {};
  long i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Doubles wide = __builtin_convertvector(lanes(r + i), Doubles);
    sums += wide * wide;
  }
  double sum = total<LANES>(sums);
  for (; i < count; i++) sum += double(r[i]) * double(r[i]);
  return 0.5 * sum;
}

static inline __attribute__((always_inline)) void copy_numbers(
    Real* to, const Real* from, long count) {
  if (count > FEW) std::memcpy(to, from, count * sizeof(Real));
  else {
    long i = 0;
    for (; i + LANES <= count; i += LANES) lanes(to + i) = lanes(from + i);
    for (; i < count; i++) to[i] = from[i];
  }
}

// A triangle of few numbers times a vector: rows times the vector's numbers, added up in registers.
// Rows are as long as whole vectors, and so is what is written; of the zeros beyond the diagonal
// whole vectors are left out. There are two sums of each number, for one would wait for itself.
struct Triangle {
  static const long ROW = whole(DIMENSION), PARTS = ROW / LANES;
  static const bool FITS = DIMENSION <= 24;
  template <bool LOWER>
  static inline __attribute__((always_inline)) void times(
      const Real* rows, const Real* x, Real* out) {
    Lanes sums[2][PARTS ? PARTS : 1] = {};
#pragma GCC unroll 24
    for (long j = 0; j < DIMENSION; j++)
#pragma GCC unroll 12
      for (long part = 0; part < PARTS; part++)
        if (LOWER ? part * LANES <= j : j < (part + 1) * LANES)
          sums[j % 2][part] += x[j] * lanes(rows + j * ROW + part * LANES);
#pragma GCC unroll 12
    for (long part = 0; part < PARTS; part++)
      lanes(out + part * LANES) = sums[0][part] + sums[1][part];
  }
};
