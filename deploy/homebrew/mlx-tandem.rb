# mlx-tandem for Homebrew, from a checkout, in a tap of your own (it is published nowhere yet):
#
#   brew tap-new local/tandem
#   cp deploy/homebrew/mlx-tandem.rb "$(brew --repository local/tandem)/Formula/"
#   HOMEBREW_TANDEM_CHECKOUT="$PWD" brew install --HEAD local/tandem/mlx-tandem
#
# It installs the last commit of the checkout's branch `main`, or of HOMEBREW_TANDEM_BRANCH.
class MlxTandem < Formula
  desc "Fine-tune a language model on all your Macs at once, or on one of them"

  # Homebrew hands on variables with this prefix only.
  head "file://#{ENV.fetch("HOMEBREW_TANDEM_CHECKOUT", "/HOMEBREW_TANDEM_CHECKOUT-is-not-set")}",
       using:  :git,
       branch: ENV.fetch("HOMEBREW_TANDEM_BRANCH", "main")

  depends_on "python@3.13"

  # Wheels leave no room in their headers for the longer names that Homebrew would write into them.
  preserve_rpath

  def install
    ENV["TANDEM_VENV"] = libexec
    system formula_python, "deploy/run", "--install"
    # No `node`: that is Node.js. `tandem` has the commands of both.
    %w[coordinator tandem].each do |name|
      bin.install_symlink libexec/"bin"/name
      generate_completions_from_executable(bin/name, shell_parameter_format: :click)
    end
  end

  def formula_python
    Formula["python@3.13"].opt_bin/"python3.13"
  end

  # No `service`: what `brew services` starts at login, macOS keeps out of the local network.
  def caveats
    <<~EOS
      To take part in the training of others: tandem serve
      To have that start by itself, use deploy/install.sh of the checkout: a service of Homebrew's has
      no app that macOS could allow into the local network.
    EOS
  end

  test do
    assert_match "mlx-tandem", shell_output("#{bin}/tandem --version")
    assert_match "serve", shell_output("#{bin}/tandem --help")
  end
end
