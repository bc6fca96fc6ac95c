// What Inductor's kernels call, and the operations that it leaves to libraries.
#define __FAST_MATH__ 1  // for declarations of vector functions alone: glibc makes them so
#include <math.h>
#undef __FAST_MATH__
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#define TORCH_CHECK(...)
#ifndef C10_LIKELY
#define C10_LIKELY(x) __builtin_expect(!!(x), 1)
#define C10_UNLIKELY(x) __builtin_expect(!!(x), 0)
#endif

namespace c10 {
static inline int64_t div_floor_integer(int64_t a, int64_t b) {
  int64_t q = a / b;
  return q - ((a % b != 0) && ((a < 0) != (b < 0)));
}
template <class To, class From>
static inline To convert(From from) {
  return static_cast<To>(from);
}
}  // namespace c10

template <class T>
static inline T max_propagate_nan(T a, T b) {
  return (a > b) | (a != a) ? a : b;
}
template <class T>
static inline T min_propagate_nan(T a, T b) {
  return (a < b) | (a != a) ? a : b;
}
template <class T>
static inline bool _isnan(T x) {
  return x != x;
}
template <class T>
static inline int sgn(T x) {
  return (x > 0) - (x < 0);
}
template <class T>
static inline T mod(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return std::fmod(a, b);
  else return a % b;
}

// The place of a largest or smallest value, the first of several; of NaN, if there is any.
template <class T>
struct IndexValue {
  int64_t index;
  T value;
  IndexValue(int64_t i, T v) : index(i), value(v) {}
  IndexValue() : index(0), value(0) {}
};
template <class T>
static inline bool stays(IndexValue<T> a, T value, int64_t index, bool larger) {
  if (a.value != a.value) return true;
  if (value != value) return false;
  if (a.value == value) return a.index < index;
  return larger ? a.value > value : a.value < value;
}
template <class T>
static inline IndexValue<T> argmax_combine(IndexValue<T> a, T value, int64_t index) {
  return stays(a, value, index, true) ? a : IndexValue<T>(index, value);
}
template <class T>
static inline IndexValue<T> argmax_combine(IndexValue<T> a, IndexValue<T> b) {
  return argmax_combine(a, b.value, b.index);
}
template <class T>
static inline IndexValue<T> argmin_combine(IndexValue<T> a, T value, int64_t index) {
  return stays(a, value, index, false) ? a : IndexValue<T>(index, value);
}
template <class T>
static inline IndexValue<T> argmin_combine(IndexValue<T> a, IndexValue<T> b) {
  return argmin_combine(a, b.value, b.index);
}

#ifndef WITH_TORCH_HEADERS
// Upwards to where the asymptotic series holds; Abramowitz and Stegun, 6.3.5 to 6.3.18.
static inline double calc_digamma(double x) {
  double shift = 0.0;
  if (x == 0.0) return std::copysign(INFINITY, -x);
  if (x < 0.0) {
    if (x == std::trunc(x)) return NAN;
    double whole, part = std::modf(x, &whole);
    shift = -M_PI / std::tan(M_PI * part);
    x = 1.0 - x;
  }
  for (; x < 10.0; x += 1.0) shift -= 1.0 / x;
  const double z = 1.0 / (x * x);
  double series = 8.33333333333333333333e-2;
  series = -2.10927960927960927961e-2 + z * series;
  series = 7.57575757575757575758e-3 + z * series;
  series = -4.16666666666666666667e-3 + z * series;
  series = 3.96825396825396825397e-3 + z * series;
  series = -8.33333333333333333333e-3 + z * series;
  series = 8.33333333333333333333e-2 + z * series;
  return shift + std::log(x) - 0.5 / x - z * series;
}
#endif

// The order of sorting, in which NaN is larger than all numbers.
template <class T>
static inline bool precedes(T a, T b) {
  return a < b || (b != b && a == a);
}

// o = a b, of shapes (N, K) and (K, M); strides by rows and columns.
template <long N, long K, long M, long AR, long AC, long BR, long BC, long OR, long OC, class T>
static inline void product(const T* a, const T* b, T* o) {
  if constexpr ((AC == 1 || AC == 0) && (BR == 1 || M == 1)) {  // rows times columns
    for (long i = 0; i < N; i++)
      for (long j = 0; j < M; j++) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < K; k++) sum += a[i * AR + k * AC] * b[k * BR + j * BC];
        o[i * OR + j * OC] = sum;
      }
  } else if constexpr (M == 1 && OR == 1 && AR == 1) {  // columns of a, one after the other
    for (long i = 0; i < N; i++) o[i] = 0;
    for (long k = 0; k < K; k++) {
      const T factor = b[k * BR];
#pragma omp simd
      for (long i = 0; i < N; i++) o[i] += a[i + k * AC] * factor;
    }
  } else {
    for (long i = 0; i < N; i++) {
      for (long j = 0; j < M; j++) o[i * OR + j * OC] = 0;
      for (long k = 0; k < K; k++) {
        const T factor = a[i * AR + k * AC];
#pragma omp simd
        for (long j = 0; j < M; j++) o[i * OR + j * OC] += factor * b[k * BR + j * BC];
      }
    }
  }
}

// The lower factor of a symmetric matrix; returns the number of the minor that is not positive.
template <class T>
static int32_t cholesky(const T* a, T* o, long n, long ar, long ac, long orow, long oc) {
  int32_t failed = 0;
  for (long i = 0; i < n; i++)
    for (long j = 0; j < n; j++) {
      T x = j > i ? T(0) : a[i * ar + j * ac];
      if (j <= i) {
        for (long k = 0; k < j; k++) x -= o[i * orow + k * oc] * o[j * orow + k * oc];
        if (i == j && !(x > 0) && !failed) failed = static_cast<int32_t>(i + 1);
        x = i == j ? std::sqrt(x) : x / o[j * orow + j * oc];
      }
      o[i * orow + j * oc] = x;
    }
  return failed;
}

// X of a X = b, for a triangular matrix of n rows and m columns of b.
template <class T>
static void solve_triangular(const T* a, const T* b, T* o, long n, long m, long ar, long ac, long br,
                             long bc, long orow, long oc, bool upper, bool unit) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < m; j++) o[i * orow + j * oc] = b[i * br + j * bc];
  for (long q = 0; q < n; q++) {
    const long i = upper ? n - 1 - q : q, first = upper ? i + 1 : 0, last = upper ? n : i;
    T* row = o + i * orow;
    if (ac == 1 && orow == 1) {  // rows of the matrix lie together
      for (long j = 0; j < m; j++) {
        T sum = 0;
        const T* column = o + j * oc;
#pragma omp simd reduction(+ : sum)
        for (long k = first; k < last; k++) sum += a[i * ar + k] * column[k];
        row[j * oc] -= sum;
      }
    } else if (ar != 1 || orow != 1) {
      for (long k = first; k < last; k++) {
        const T factor = a[i * ar + k * ac], *other = o + k * orow;
#pragma omp simd
        for (long j = 0; j < m; j++) row[j * oc] -= factor * other[j * oc];
      }
    }
    if (!unit)
      for (long j = 0; j < m; j++) row[j * oc] /= a[i * ar + i * ac];
    if (ac != 1 && ar == 1 && orow == 1) {  // columns of it do: what is found leaves the others
      const long begin = upper ? 0 : i + 1, end = upper ? i : n;
      for (long j = 0; j < m; j++) {
        T* column = o + j * oc;
        const T factor = column[i];
#pragma omp simd
        for (long k = begin; k < end; k++) column[k] -= factor * a[k + i * ac];
      }
    }
  }
}
