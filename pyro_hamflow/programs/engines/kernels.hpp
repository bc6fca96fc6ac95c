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

// Four sums at once, of four rows of a matrix times a vector: one alone waits for its additions.
template <class T>
static inline void four_products(const T* a, long stride, const T* x, long n, T* sums) {
  const T *b = a + stride, *c = b + stride, *d = c + stride;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (long k = 0; k < n; k++) {
    const T factor = x[k];
    s0 += a[k] * factor, s1 += b[k] * factor, s2 += c[k] * factor, s3 += d[k] * factor;
  }
  sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}
// The same of any number of rows.
template <class T>
static inline void products(const T* a, long stride, long rows, const T* x, long n, T* sums) {
  long i = 0;
  for (; i + 4 <= rows; i += 4) four_products(a + i * stride, stride, x, n, sums + i);
  for (; i < rows; i++) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long k = 0; k < n; k++) sum += a[i * stride + k] * x[k];
    sums[i] = sum;
  }
}
// Adds rows of a matrix, each times its factor, to a vector: four at a time.
template <class T>
static inline void add_rows(const T* a, long stride, long rows, const T* x, long step, long n,
                            T* o) {
  long i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *b = a + i * stride, *c = b + stride, *d = c + stride, *e = d + stride;
    const T x0 = x[i * step], x1 = x[(i + 1) * step];
    const T x2 = x[(i + 2) * step], x3 = x[(i + 3) * step];
#pragma omp simd
    for (long j = 0; j < n; j++) o[j] += (x0 * b[j] + x1 * c[j]) + (x2 * d[j] + x3 * e[j]);
  }
  for (; i < rows; i++) {
    const T factor = x[i * step], *row = a + i * stride;
#pragma omp simd
    for (long j = 0; j < n; j++) o[j] += factor * row[j];
  }
}

// o = a b, of shapes (N, K) and (K, M); strides by rows and columns.
template <long N, long K, long M, long AR, long AC, long BR, long BC, long OR, long OC, class T>
static inline void product(const T* a, const T* b, T* o) {
  if constexpr (AC == 1 && BR == 1 && OR == 1) {  // rows times columns
    for (long j = 0; j < M; j++) products(a, AR, N, b + j * BC, K, o + j * OC);
  } else if constexpr (AC == 1 && BR == 1 && OC == 1) {
    for (long i = 0; i < N; i++) products(b, BC, M, a + i * AR, K, o + i * OR);
  } else if constexpr ((AC == 1 || AC == 0) && (BR == 1 || M == 1)) {
    for (long i = 0; i < N; i++)
      for (long j = 0; j < M; j++) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < K; k++) sum += a[i * AR + k * AC] * b[k * BR + j * BC];
        o[i * OR + j * OC] = sum;
      }
  } else if constexpr (M == 1 && OR == 1 && AR == 1) {  // columns of a, one after the other
    for (long i = 0; i < N; i++) o[i] = 0;
    add_rows(a, AC, K, b, BR, N, o);
  } else if constexpr (BC == 1 && OC == 1) {  // rows of b likewise
    for (long i = 0; i < N; i++) {
      for (long j = 0; j < M; j++) o[i * OR + j] = 0;
      add_rows(b, BR, K, a + i * AR, AC, M, o + i * OR);
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
  for (long j = 0; j < n; j++) {
    T* column = o + j * oc;
    for (long i = 0; i < n; i++) column[i * orow] = i < j ? T(0) : a[i * ar + j * ac];
    if (orow == 1) {  // columns before it, each times its number in this row
      T* negative = column;  // the numbers above the diagonal, which become zero
      for (long k = 0; k < j; k++) negative[k] = -o[j + k * oc];
      add_rows(o + j, oc, j, negative, 1, n - j, column + j);
      for (long k = 0; k < j; k++) negative[k] = 0;
    } else {
      for (long i = j; i < n; i++) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < j; k++) sum += o[i * orow + k * oc] * o[j * orow + k * oc];
        column[i * orow] -= sum;
      }
    }
    T& corner = column[j * orow];
    if (!(corner > 0) && !failed) failed = static_cast<int32_t>(j + 1);
    corner = std::sqrt(corner);
    for (long i = j + 1; i < n; i++) column[i * orow] /= corner;
  }
  return failed;
}

// X of a X = b, for a triangular matrix of n rows and m columns of b; four unknown rows at a time.
template <class T>
static void solve_triangular(const T* a, const T* b, T* o, long n, long m, long ar, long ac, long br,
                             long bc, long orow, long oc, bool upper, bool unit) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < m; j++) o[i * orow + j * oc] = b[i * br + j * bc];
  const bool rows = ac == 1 && orow == 1, columns = !rows && ar == 1 && orow == 1;
  for (long done = 0, wide; done < n; done += wide) {
    wide = std::min(4L, n - done);
    const long top = upper ? n - done - wide : done, bottom = top + wide;
    const long first = upper ? bottom : 0, known = done;
    for (long j = 0; rows && j < m; j++) {  // rows of the matrix lie together
      T sums[4], *column = o + j * oc;
      products(a + top * ar + first, ar, wide, column + first, known, sums);
      for (long p = 0; p < wide; p++) column[top + p] -= sums[p];
    }
    for (long i = top; !rows && !columns && i < bottom; i++)
      for (long k = first; k < first + known; k++) {
        const T factor = a[i * ar + k * ac], *other = o + k * orow;
        T* row = o + i * orow;
#pragma omp simd
        for (long j = 0; j < m; j++) row[j * oc] -= factor * other[j * oc];
      }
    for (long p = 0; p < wide; p++) {  // the triangle on the diagonal
      const long i = upper ? bottom - 1 - p : top + p;
      T* row = o + i * orow;
      for (long j = 0; !unit && j < m; j++) row[j * oc] /= a[i * ar + i * ac];
      for (long k = upper ? top : i + 1; k < (upper ? i : bottom); k++) {
        const T factor = a[k * ar + i * ac];
        for (long j = 0; j < m; j++) o[k * orow + j * oc] -= factor * row[j * oc];
      }
    }
    for (long j = 0; columns && j < m; j++) {  // its columns do: what is found leaves the others
      T negative[4], *column = o + j * oc;
      for (long p = 0; p < wide; p++) negative[p] = -column[top + p];
      const long begin = upper ? 0 : bottom, rest = n - bottom;
      add_rows(a + begin + top * ac, ac, wide, negative, 1, upper ? top : rest, column + begin);
    }
  }
}

// The factors of a square matrix in one, its rows exchanged so that the largest number left in a
// column divides the others; with which row each was exchanged, counted from one.
template <class T>
static void lu(const T* a, T* o, int32_t* pivots, long n, long ar, long ac, long orow, long oc) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < n; j++) o[i * orow + j * oc] = a[i * ar + j * ac];
  for (long k = 0; k < n; k++) {
    long largest = k;
    for (long i = k + 1; i < n; i++)
      if (std::abs(o[i * orow + k * oc]) > std::abs(o[largest * orow + k * oc])) largest = i;
    pivots[k] = static_cast<int32_t>(largest + 1);
    for (long j = 0; largest != k && j < n; j++)
      std::swap(o[k * orow + j * oc], o[largest * orow + j * oc]);
    T* column = o + k * oc;
    if (column[k * orow] == 0) continue;
    for (long i = k + 1; i < n; i++) column[i * orow] /= column[k * orow];
    for (long j = k + 1; j < n; j++) {
      const T factor = o[k * orow + j * oc];
      for (long i = k + 1; i < n; i++) o[i * orow + j * oc] -= column[i * orow] * factor;
    }
  }
}

// X of a X = b, or of a' X = b, by the factors of a.
template <class T>
static void lu_solve(const T* a, const T* b, T* o, const int32_t* pivots, long n, long m, long ar,
                     long ac, long br, long bc, long orow, long oc, bool adjoint) {
  for (long i = 0; i < n; i++)
    for (long j = 0; j < m; j++) o[i * orow + j * oc] = b[i * br + j * bc];
  const auto exchange = [&](long k) {
    const long other = pivots[k] - 1;
    for (long j = 0; other != k && j < m; j++)
      std::swap(o[k * orow + j * oc], o[other * orow + j * oc]);
  };
  for (long k = 0; !adjoint && k < n; k++) exchange(k);
  const long sr = adjoint ? ac : ar, sc = adjoint ? ar : ac;  // of a', whose lower factor is u'
  solve_triangular(a, o, o, n, m, sr, sc, orow, oc, orow, oc, false, !adjoint);
  solve_triangular(a, o, o, n, m, sr, sc, orow, oc, orow, oc, true, adjoint);
  for (long k = n - 1; adjoint && k >= 0; k--) exchange(k);
}

template <class T>
static void determinant(const T* factors, const int32_t* pivots, long n, long step, T* value) {
  *value = 1;
  for (long k = 0; k < n; k++)
    *value *= pivots[k] == k + 1 ? factors[k * step] : -factors[k * step];
}
template <class T>
static void log_determinant(const T* factors, const int32_t* pivots, long n, long step, T* sign,
                            T* value) {
  *sign = 1, *value = 0;
  for (long k = 0; k < n; k++) {
    const T x = pivots[k] == k + 1 ? factors[k * step] : -factors[k * step];
    *sign *= x > 0 ? T(1) : x < 0 ? T(-1) : x, *value += std::log(std::abs(x));
  }
}

// The logarithm of a sum of exponentials.
template <class T>
static T log_sum(T a, T b) {
  if (a != a || b != b) return a + b;
  const T high = std::max(a, b), low = std::min(a, b);
  return high == low && std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}
