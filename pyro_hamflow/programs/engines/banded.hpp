// Symmetric matrices with few bands: entry k of row i is the matrix's at (i, i - k).
#include <algorithm>
#include <cmath>

namespace banded {
static const long WIDE = 8;  // entries that are multiplied one by one, without vectors of them

// Pivots first, so that one division alone lies between rows, which wait for each other.
template <class T>
static void factorise(long batch, long n, long q, const T *matrix, T *root) {
  T *inverse = new T[n + q], *row = inverse + n;
  for (long r = 0; r < batch; r++, matrix += n * q, root += n * q) {
    for (long i = 0; i < n; i++) {
      const long m = i < q - 1 ? i : q - 1;
      T pivot = matrix[i * q];
      for (long k = q - 1; k > m; k--) root[i * q + k] = 0;
      for (long k = m; k > 0; k--) {
        const T *other = root + (i - k) * q;
        T t = matrix[i * q + k];
        if (m - k < WIDE)
          for (long c = 1; k + c <= m; c++) t -= row[k + c] * other[c];
        else {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (long c = 1; c <= m - k; c++) sum += row[k + c] * other[c];
          t -= sum;
        }
        row[k] = t * inverse[i - k];
        root[i * q + k] = t;
        pivot -= row[k] * t;
      }
      root[i * q] = pivot;
      inverse[i] = 1 / pivot;
    }
    for (long i = 0; i < n; i++) inverse[i] = 1 / (root[i * q] = std::sqrt(root[i * q]));
    for (long i = 0; i < n; i++)
      for (long k = 1; k < q && k <= i; k++) root[i * q + k] *= inverse[i - k];
  }
  delete[] inverse;
}
template <class T>
static void factorise_adjoint(long batch, long n, long q, const T *root, T *slope, T *result) {
  T *inverse = new T[n];
  for (long r = 0; r < batch; r++, root += n * q, slope += n * q, result += n * q) {
    for (long i = 0; i < n; i++) inverse[i] = 1 / root[i * q];
    for (long i = n - 1; i >= 0; i--) {
      const long m = i < q - 1 ? i : q - 1;
      const T *own = root + i * q;
      T *here = slope + i * q;
      const T twice = here[0] * inverse[i];
      result[i * q] = twice / 2;
      for (long c = 1; c <= m; c++) here[c] -= twice * own[c];
      for (long k = m + 1; k < q; k++) result[i * q + k] = 0;
      for (long k = 1; k <= m; k++) {
        const T *other = root + (i - k) * q;
        T *there = slope + (i - k) * q, t = here[k] * inverse[i - k];
        there[0] -= t * own[k];
        result[i * q + k] = t;
        if (m - k < WIDE)
          for (long c = 1; k + c <= m; c++) here[k + c] -= t * other[c], there[c] -= t * own[k + c];
        else
#pragma omp simd
          for (long c = 1; c <= m - k; c++) here[k + c] -= t * other[c], there[c] -= t * own[k + c];
      }
    }
  }
  delete[] inverse;
}
// The same entries beside the diagonal, and enough on it.
template <class T>
static void dominate(long n, long q, const T *matrix, T *result) {
  T least = 0, *scale = new T[2 * n], *beside = scale + n;
  for (long i = 0; i < n; i++) least = std::max(least, std::abs(matrix[i * q]));
  least *= T(1e-6);
  for (long i = 0; i < n; i++) scale[i] = std::sqrt(std::max(std::abs(matrix[i * q]), least)), beside[i] = 0;
  for (long i = 0; i < n; i++)
    for (long k = 1; k < q; k++) {
      result[i * q + k] = matrix[i * q + k];
      if (k > i) continue;
      const T relative = std::abs(matrix[i * q + k]) / (scale[i] * scale[i - k]);
      beside[i] += relative, beside[i - k] += relative;
    }
  for (long i = 0; i < n; i++) {
    const T enough = scale[i] * scale[i] * beside[i] * T(1.01) + least;
    result[i * q] = matrix[i * q] > enough ? matrix[i * q] : enough;
  }
  delete[] scale;
}
// From slopes in what `dominate` makes to those in the matrix, in place.
template <class T>
static void dominate_adjoint(long n, long q, const T *matrix, T *slope) {
  T largest = 0, least_slope = 0, *size = new T[4 * n];
  T *beside = size + n, *taken = beside + n, *moved = taken + n;
  long at = 0;
  for (long i = 0; i < n; i++)
    if (std::abs(matrix[i * q]) > largest) largest = std::abs(matrix[i * q]), at = i;
  const T least = largest * T(1e-6);
  for (long i = 0; i < n; i++)
    size[i] = std::max(std::abs(matrix[i * q]), least), beside[i] = moved[i] = 0;
  for (long i = 0; i < n; i++)
    for (long k = 1; k < q && k <= i; k++) {
      const T relative = std::abs(matrix[i * q + k]) / std::sqrt(size[i] * size[i - k]);
      beside[i] += relative, beside[i - k] += relative;
    }
  for (long i = 0; i < n; i++) {
    taken[i] = matrix[i * q] > size[i] * beside[i] * T(1.01) + least ? 0 : slope[i * q];
    slope[i * q] -= taken[i];
    least_slope += taken[i];
  }
  for (long i = 0; i < n; i++)
    for (long k = 1; k < q && k <= i; k++) {
      const long j = i - k;
      const T entry = matrix[i * q + k] * T(1.01), ratio = std::sqrt(size[i] / size[j]);
      const T up = taken[i] * ratio, down = taken[j] / ratio;
      const T sign = (entry > 0) - (entry < 0), half = std::abs(entry) / 2 * (up - down);
      slope[i * q + k] += T(1.01) * sign * (up + down);
      moved[i] += half / size[i], moved[j] -= half / size[j];
    }
  for (long i = 0; i < n; i++) {
    const T sign = (matrix[i * q] > 0) - (matrix[i * q] < 0);
    if (std::abs(matrix[i * q]) > least) slope[i * q] += sign * moved[i];
    else least_slope += moved[i];
  }
  slope[at * q] += ((matrix[at * q] > 0) - (matrix[at * q] < 0)) * T(1e-6) * least_slope;
  delete[] size;
}
template <class T>
static void root(long batch, long n, long q, const T *matrix, T *root, T *mended) {
  for (long r = 0; r < batch; r++, matrix += n * q, root += n * q) {
    factorise(1, n, q, matrix, root);
    bool defined = true;
    for (long i = 0; i < n; i++) defined &= root[i * q] > 0 && root[i * q] - root[i * q] == 0;
    mended[r] = !defined;
    if (defined) continue;
    T *other = new T[n * q];
    dominate(n, q, matrix, other);
    factorise(1, n, q, other, root);
    delete[] other;
  }
}
template <class T>
static void root_adjoint(long batch, long n, long q, const T *matrix, const T *root,
                         const T *mended, T *slope, T *result) {
  factorise_adjoint(batch, n, q, root, slope, result);
  for (long r = 0; r < batch; r++, matrix += n * q, result += n * q)
    if (mended[r] != 0) dominate_adjoint(n, q, matrix, result);
}
// With two bands, so many vectors at once: each waits for its own last number.
template <long COUNT, class T>
static void solve_pairs(long n, long transposed, const T *root, const T *vectors, T *result) {
  T x[COUNT] = {};
  if (transposed) {
    T next = 0;
    for (long i = n - 1; i >= 0; i--) {
      const T inverse = 1 / root[i * 2], factor = next * inverse;
      for (long w = 0; w < COUNT; w++)
        result[w * n + i] = x[w] = vectors[w * n + i] * inverse - factor * x[w];
      next = root[i * 2 + 1];
    }
  } else
    for (long i = 0; i < n; i++) {
      const T inverse = 1 / root[i * 2], factor = i ? root[i * 2 + 1] * inverse : 0;
      for (long w = 0; w < COUNT; w++)
        result[w * n + i] = x[w] = vectors[w * n + i] * inverse - factor * x[w];
    }
}
template <class T>
static void solve(long batch, long count, long n, long q, long transposed, const T *root,
                  const T *vectors, T *result) {
  for (long r = 0; r < batch; r++, root += n * q) {
    long w = 0;
    for (; q == 2 && w + 4 <= count; w += 4, vectors += 4 * n, result += 4 * n)
      solve_pairs<4>(n, transposed, root, vectors, result);
    for (; w < count; w++, vectors += n, result += n) {
      if (q == 2)
        solve_pairs<1>(n, transposed, root, vectors, result);
      else if (transposed) {
        for (long i = 0; i < n; i++) result[i] = vectors[i];
        for (long i = n - 1; i >= 0; i--) {
          const T x = result[i] / root[i * q], *row = root + i * q;
          const long m = i < q - 1 ? i : q - 1;
          result[i] = x;
#pragma omp simd
          for (long k = 1; k <= m; k++) result[i - k] -= row[k] * x;
        }
      } else
        for (long i = 0; i < n; i++) {
          const T *row = root + i * q;
          const long m = i < q - 1 ? i : q - 1;
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (long k = 1; k <= m; k++) sum += row[k] * result[i - k];
          result[i] = (vectors[i] - sum) / row[0];
        }
    }
  }
}
template <class T>
static void outer(long batch, long count, long n, long q, const T *left, const T *right,
                  T *result) {
  for (long r = 0; r < batch; r++, result += n * q) {
    for (long i = 0; i < n * q; i++) result[i] = 0;
    for (long w = 0; w < count; w++, left += n, right += n)
      for (long i = 0; i < n; i++)
        for (long k = 0; k < q && k <= i; k++) result[i * q + k] += left[i] * right[i - k];
  }
}
}  // namespace banded
