// What Inductor's kernels call.
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
#include <utility>

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

// The first where a condition holds. Each of them may be a vector, and one number stands for many.
template <class T>
static constexpr bool is_one = std::is_arithmetic<T>::value;
template <class A, class B>
using Both = decltype(std::declval<A>() + std::declval<B>());
template <class C, class A, class B>
static inline auto choose(C condition, A first, B second) {
  if constexpr (is_one<C> && std::is_same<A, B>::value) return condition ? first : second;
  else if constexpr (std::is_same<A, bool>::value || std::is_same<B, bool>::value)
    return (condition && first) || (!condition && second);
  else if constexpr (!is_one<C>) return condition ? first : second;
  else return condition ? Both<A, B>(first - Both<A, B>{}) : Both<A, B>(second - Both<A, B>{});
}

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
