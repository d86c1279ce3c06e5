"""Report after the tests how closely each closed-form gradient and autodiff agree."""


def pytest_terminal_summary(terminalreporter):
    found = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for key, value in report.user_properties
        if key == "closed form"
    ]
    if found:
        errors = {(name, dtype): error for name, dtype, error in found}
        names = sorted({name for name, _, _ in found})
        terminalreporter.section(f"{len(names)} objectives against their closed-form gradients: largest relative error")
        for name in names:
            cells = [
                f"{dtype} {errors[name, dtype]:.1e}" for dtype in ("float32", "float64") if (name, dtype) in errors
            ]
            terminalreporter.write_line(f"{name:<48}{'   '.join(cells)}")
