# bash completions for abliterate
_abliterate() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb="" at
  case $before in --config|--file|--output-dir|--socket) COMPREPLY=($(compgen -f -- "$word")); return ;; esac
  for ((at = 1; at < COMP_CWORD; at++)); do
    case ${COMP_WORDS[at]} in
      --config|--file|--output-dir|--socket) ((at++)) ;;
      -*) ;;
      *) verb=${COMP_WORDS[at]}; break ;;
    esac
  done
  case $verb in
    "") COMPREPLY=($(compgen -W "submit status logs report wait cancel hold release retry models doctor repair undo pause resume drain clean new check chat compare ui import-config download-lists completions --help --version --config --socket" -- "$word")) ;;
    submit) COMPREPLY=($(compgen -f -W "-h --help --name --set --watch --json --config --socket" -- "$word")) ;;
    status) COMPREPLY=($(compgen -W "-h --help --watch --json --config --socket" -- "$word")) ;;
    logs) COMPREPLY=($(compgen -W "-h --help -f --follow --config --socket" -- "$word")) ;;
    report) COMPREPLY=($(compgen -W "-h --help --html --json --open --config --socket" -- "$word")) ;;
    wait) COMPREPLY=($(compgen -W "-h --help --timeout --json --config --socket" -- "$word")) ;;
    cancel) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    hold) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    release) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    retry) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    models) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    doctor) COMPREPLY=($(compgen -f -W "-h --help --from --deep --json --config --socket" -- "$word")) ;;
    repair) COMPREPLY=($(compgen -f -W "-h --help --from --back --json --config --socket" -- "$word")) ;;
    undo) COMPREPLY=($(compgen -W "-h --help --copy --json --config --socket" -- "$word")) ;;
    pause) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    resume) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    drain) COMPREPLY=($(compgen -W "-h --help --json --config --socket" -- "$word")) ;;
    clean) COMPREPLY=($(compgen -W "-h --help --days --json --config --socket" -- "$word")) ;;
    new) COMPREPLY=($(compgen -f -W "-h --help --host --config --socket" -- "$word")) ;;
    check) COMPREPLY=($(compgen -f -W "-h --help --json --config --socket" -- "$word")) ;;
    chat) COMPREPLY=($(compgen -W "-h --help --system --set --think --hide-thinking --tools --verbose --keepalive --no-history --host --config --socket" -- "$word")) ;;
    compare) COMPREPLY=($(compgen -W "-h --help --file --base --system --set --think --tokens --host --json --config --socket" -- "$word")) ;;
    ui) COMPREPLY=($(compgen -W "-h --help --port --open --config --socket" -- "$word")) ;;
    import-config) COMPREPLY=($(compgen -f -W "-h --help --config --socket" -- "$word")) ;;
    download-lists) COMPREPLY=($(compgen -W "-h --help --output-dir --list --yes --json --config --socket" -- "$word")) ;;
    completions) COMPREPLY=($(compgen -W "-h --help --config --socket bash zsh fish" -- "$word")) ;;
  esac
}
complete -o filenames -F _abliterate abliterate
