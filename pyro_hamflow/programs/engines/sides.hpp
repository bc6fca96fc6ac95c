// One number of each of several chains, as a vector of the processor, and what a gradient that is
// written number by number does with it. Numbers of the data are the same for all chains.
static const long WIDTH = 4;  // chains; of eight each took as long, in vectors twice as wide
// They may lie anywhere in memory. A template whose argument this is would forget that, and read and
// write as if they lay at whole vectors.
using Numbers = Vector<Real, WIDTH>::Type;

template <class V>
using Side = std::enable_if_t<!is_one<V>, V>;
template <class V>
using Element = std::decay_t<decltype(std::declval<V>()[0])>;

template <class A, class B>
static inline auto larger(A a, B b) {
  return choose(a > b || a != a, a, b);
}
template <class A, class B>
static inline auto smaller(A a, B b) {
  return choose(a < b || a != a, a, b);
}
template <class V>
static inline Side<V> sign_of(V x) {
  return choose(x > 0, V{} + 1, choose(x < 0, V{} - 1, V{}));
}
template <class V>
static inline Side<V> abs(V x) {
  return choose(x < 0, -x, choose(x == 0, V{}, x));
}
template <class V>
static inline auto isinf(V x) -> decltype(x == Side<V>{}) {
  return abs(x) == INFINITY;
}

// A function of each number: of most the compiler knows one of vectors.
#define EACH(name, call)                                          \
  template <class V>                                              \
  static inline Side<V> name(V x) {                               \
    const long count = sizeof(V) / sizeof(Element<V>);            \
    Element<V> from[count], to[count];                            \
    std::memcpy(from, &x, sizeof x);                              \
    _Pragma("omp simd") for (long k = 0; k < count; k++) to[k] = call(from[k]); \
    std::memcpy(&x, to, sizeof x);                                \
    return x;                                                     \
  }
#define EACH_OF_STD(name) using std::name; EACH(name, std::name)
EACH_OF_STD(exp) EACH_OF_STD(expm1) EACH_OF_STD(log) EACH_OF_STD(log1p) EACH_OF_STD(sqrt)
EACH_OF_STD(sin) EACH_OF_STD(cos) EACH_OF_STD(tan) EACH_OF_STD(tanh) EACH_OF_STD(sinh)
EACH_OF_STD(cosh) EACH_OF_STD(asin) EACH_OF_STD(acos) EACH_OF_STD(atan) EACH_OF_STD(asinh)
EACH_OF_STD(acosh) EACH_OF_STD(atanh) EACH_OF_STD(erf) EACH_OF_STD(erfc) EACH_OF_STD(lgamma)
EACH_OF_STD(nearbyint) EACH_OF_STD(floor) EACH_OF_STD(ceil) EACH_OF_STD(trunc)
EACH(digamma, calc_digamma)

template <class A, class B>
static inline auto power(A base, B exponent) {
  using V = Both<A, B>;
  const long count = sizeof(V) / sizeof(Element<V>);
  const V x = base - V{}, y = exponent - V{};
  V made;
  for (long k = 0; k < count; k++) made[k] = std::pow(x[k], y[k]);
  return made;
}

// Numbers as what they are, conditions as numbers, numbers as conditions.
template <class To, class From>
static inline auto as(From x) {
  if constexpr (is_one<From>) return To(x);
  else if constexpr (std::is_same<To, bool>::value) return x != 0;
  else if constexpr (std::is_same<Element<From>, To>::value) return x;
  else return __builtin_convertvector(
      -x, typename Vector<To, sizeof(From) / sizeof(Element<From>)>::Type);
}
